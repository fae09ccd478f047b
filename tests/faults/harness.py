"""Runs of several processes, and ways to harm them from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from ltx_train.training.tracking.metrics import read_rows


@contextmanager
def started(arguments: list[str], log: Path, **environment: str) -> Generator[subprocess.Popen[bytes]]:
    """`ltx-train ...` in a session of its own, killed at the end with all it has started."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "ltx_train", *arguments], stdout=out, stderr=out,
            start_new_session=True, env={**os.environ, **environment},
        )  # fmt: skip
    try:
        yield process
    finally:
        for pid in (*ranks(process.pid), process.pid):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks(parent: int) -> list[int]:
    """The processes of a run by rank, empty while they are being started."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            variables = dict(v.partition(b"=")[::2] for v in (path / "environ").read_bytes().split(b"\0"))
            command = (path / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if b"RANK" in variables and b"spawn_main" in command:
            found[int(variables[b"RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def steps_done(run: Path) -> int:
    rows = read_rows(run / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0
