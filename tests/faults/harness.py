"""Runs of several processes, and ways to harm them from outside.

Commands are forked from a server that has imported the libraries, because importing them takes six seconds of a
processor. test_slurm.py and test_command_line.py start commands with an interpreter of their own.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from ltx_train.config.command_table import COMMANDS
from ltx_train.training.tracking.metrics import read_rows

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.preload"])
# What a loaded machine may take; a test that passes never waits for it.
PATIENCE_S = 300.0


class Running:
    """`ltx-train ...` in a session of its own; its output is appended to a file."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        log.touch()
        self._process = SERVER.Process(target=_run, args=(arguments, str(log), {**os.environ, **environment}))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; negative: the number of the signal that ended it. None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = PATIENCE_S) -> int:
        self._process.join(seconds)
        code = self.poll()
        assert code is not None, f"still running after {seconds} s"
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def import_commands() -> None:
    """Imports what commands import when they run."""
    for name in COMMANDS:
        if name != "completion":
            importlib.import_module(f"ltx_train.commands.{name}")
    os.environ["DS_ACCELERATOR"] = "cpu"
    for library in ("deepspeed", "bitsandbytes.optim"):
        importlib.import_module(library)


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    # A server that could not import them would only be slow, six seconds for each command.
    assert "ltx_train.commands.fit" in sys.modules
    from ltx_train.__main__ import run
    from ltx_train.jobs import processes

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    warnings.simplefilter("ignore")
    # Ranks, trials and supervised runs are forked too: with the method `spawn` each would import everything again.
    processes.get_context = lambda _method: get_context("fork")
    sys.exit(run(arguments))


@contextmanager
def started(arguments: list[str], log: Path, **environment: str) -> Generator[Running]:
    """A running command, killed at the end with all it has started."""
    process = Running(arguments, log, environment)
    try:
        yield process
    finally:
        for pid in (*children(process.pid), process.pid):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(parent: int) -> list[int]:
    """The processes that a command has started with multiprocessing, in the order of their start: its ranks, or the
    run that it supervises. Empty while they are being started."""
    started_by_it: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            above = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            line = (path / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if above == parent and (b"spawn_main" in line or b"forkserver" in line):
            started_by_it.append(int(path.name))
    return sorted(started_by_it)


def wait_for(condition: Callable[[], bool], process: Running, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def steps_done(run: Path) -> int:
    rows = read_rows(run / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0
