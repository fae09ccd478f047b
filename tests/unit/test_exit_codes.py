"""A failed GPU has a code of its own, and an error that a signal caused has the signal's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ltx_train import signals
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit
from ltx_train.jobs import processes
from ltx_train.jobs.exit_codes import exit_code_of, is_device_fault
from ltx_train.training.preemption import Preemption
from tests.conftest import REPOSITORY


class AcceleratorError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (AcceleratorError("anything"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("NCCL error: ncclUnhandledCudaError: Call to CUDA function failed."), True),
        (RuntimeError("NCCL error: ncclRemoteError: remote process exited or there was a network error"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_what_counts_as_a_failed_gpu(error: RuntimeError, is_fault: bool) -> None:
    assert is_device_fault(error) is is_fault


def test_a_failed_gpu_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LTX_TRAIN_LOST_DEVICES", str(tmp_path / "lost"))
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")

    def work() -> int:
        raise AcceleratorError("CUDA error: an illegal instruction was encountered")

    assert exit_code_of(work) == Exit.DEVICE == 71
    assert (tmp_path / "lost").read_text() == "2 gpu7\n"
    assert "a GPU of gpu7 failed" in capsys.readouterr().err


_STOPPED_IN_EXEC = """
import os, sys
from ltx_train import signals
from ltx_train.jobs.exit_codes import exit_code_of

signals.stop_like_ctrl_c()
sys.exit(exit_code_of(lambda: exec("os.kill(os.getpid(), {number})", globals())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.STOP, ids=lambda number: number.name)
def test_a_signal_while_an_import_makes_a_class_is_a_preemption(number: signal.Signals, tmp_path: Path) -> None:
    """Libraries make dataclasses and named tuples with `exec`. A plain KeyboardInterrupt ended `python -m` with 130."""
    (tmp_path / "stopped.py").write_text(_STOPPED_IN_EXEC.format(number=int(number)))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    assert subprocess.run([sys.executable, "-m", "stopped"], env=environment, check=False).returncode == Exit.PREEMPTED


@pytest.fixture
def started_command(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The handlers of a command that has just been started."""
    before = {number: signal.getsignal(number) for number in signals.STOP}
    signals.stop_like_ctrl_c()
    yield
    monkeypatch.setattr(signals, "_arrived", False)
    for number, handler in before.items():
        signal.signal(number, handler)


def swallowing(then: Exception | None) -> Callable[[], int]:
    """Work that a signal interrupts inside of a library, which drops the KeyboardInterrupt or raises another error."""

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            if then is not None:
                raise then from None
        return 0

    return work


@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), OSError(5, "eio"), ConfigError("x")])
def test_an_error_behind_a_signal_is_the_signals(
    error: Exception, started_command: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(swallowing(error)) == Exit.PREEMPTED
    assert capsys.readouterr().err == "ltx-train: stopped\n"


def test_a_signal_that_a_library_dropped_stops_training(started_command: None) -> None:
    assert not Preemption().requested
    assert exit_code_of(swallowing(None)) == Exit.DONE
    assert Preemption().requested


def test_errors_without_a_signal_stay(started_command: None) -> None:
    def work() -> int:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        exit_code_of(work)


def test_a_signal_in_a_childs_first_moment_is_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its handlers and before its entry, where multiprocessing made exit code 1 of it."""
    monkeypatch.setattr(processes.os, "setpgid", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    child = get_context("fork").Process(target=processes._child, args=(lambda _: 0, Config(), os.getpid()))
    child.start()
    child.join()
    assert child.exitcode == Exit.PREEMPTED


@pytest.mark.parametrize("seen_alive", [0, 1])
def test_a_killed_rank_is_the_cause_also_when_all_end_at_once(
    seen_alive: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 lost its connection to the killed rank 1, and both have ended by the next look."""
    looks = iter([True] * seen_alive + [False] * 9)
    children: Any = [
        SimpleNamespace(exitcode=code, is_alive=lambda: next(looks), pid=None) for code in (1, -signal.SIGKILL)
    ]
    assert processes._wait_for_all(children, set()) == 128 + signal.SIGKILL
    assert capsys.readouterr().err.count("rank 1 was killed by SIGKILL") == 1
