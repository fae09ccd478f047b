"""Errors of the file system at any operation of a run: one line, the documented code, and the same command goes on."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import command
from tests.faults.test_resume import curve, fit, newest

pytestmark = pytest.mark.slow
ERRORS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
OPERATIONS = ("open", "fsync", "replace", "rename", "mkdir", "scandir", "listdir", "unlink", "stat")


@dataclass
class FailingDisk:
    """Raises `number` at the operation `at` on files below `root`, counted from 0; `lasting`: at all later ones too."""

    root: Path
    number: int = 0
    at: int | None = None
    lasting: bool = False
    done: list[str] = field(default_factory=list)

    @contextmanager
    def installed(self) -> Generator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, self._failing(name, getattr(os, name)))
            opened = self._failing("open", io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            yield

    def _failing(self, name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            if self._is_below(path):
                count = len(self.done)
                self.done.append(name)
                if self.at is not None and (count == self.at or (self.lasting and count > self.at)):
                    raise OSError(self.number, os.strerror(self.number), str(path))
            return whole(path, *arguments, **named)

        return operation

    def _is_below(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return os.fsdecode(path).startswith(str(self.root))


@pytest.fixture(scope="module")
def whole(prepared: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An unbroken run, and its operations on files."""
    root = tmp_path_factory.mktemp("whole")
    disk = FailingDisk(root)
    with disk.installed():
        assert command(*run(prepared, clips, root)) == 0
    return root, disk.done


def run(prepared: Path, clips: Path, root: Path) -> list[str]:
    return fit(
        prepared, clips, root, "optim.steps=3", "checkpoint.interval=1", "checkpoint.on_full=stop", "eval.interval=2",
        "eval.max_samples=1", "data.workers=0", "memory=none", "optim=adamw",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_an_error_of_the_file_system_costs_nothing_that_was_saved(
    seed: int, whole: tuple[Path, list[str]], prepared: Path, clips: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A random operation fails, once or from then on."""
    draw = random.Random(seed)
    first, operations = whole
    number = ERRORS[seed % len(ERRORS)]
    disk = FailingDisk(tmp_path, number, at=draw.randrange(len(operations)), lasting=seed % 2 == 0)
    arguments = run(prepared, clips, tmp_path)
    with disk.installed():
        code = command(*arguments)
    shown = capsys.readouterr().err
    failed = f"{errno.errorcode[number]} at {operations[disk.at or 0]} {disk.at} of {len(operations)}: {code}\n{shown}"
    assert code in (0, 78), failed
    assert "Traceback" not in shown, failed
    if code:
        assert [line for line in shown.splitlines() if line.startswith("ltx-train: ")], failed
    assert command(*arguments) == 0, failed
    one, other = (root / "audio_reference" / "main" for root in (first, tmp_path))
    assert curve(one) == curve(other), failed
    for name in ("weights.safetensors", "optimizer.safetensors"):
        expected, continued = load_file(newest(one) / name), load_file(newest(other) / name)
        assert all(bool((expected[key] == continued[key]).all()) for key in expected), failed
