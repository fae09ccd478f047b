"""One trial of a search as a process of this machine or as a SLURM job.

Owns how a trial is started, found again, given up and what it ended with. Which trials there are is the search's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from functools import partial
from typing import Any, Protocol

import torch

from ltx_train.assembly import resolve
from ltx_train.config import Config
from ltx_train.contracts import Exit, UserError
from ltx_train.jobs import processes, slurm

# A job that has ended is asked for its exit code; the queue is not asked more often than this.
_ASK_S = 2.0
_ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED"}


class Running(Protocol):
    """A started trial. code: what it ended with, None while it has not."""

    @property
    def code(self) -> int | None: ...

    def give_up(self) -> None:
        """Its result is of no interest any more."""
        ...

    def stop(self) -> None:
        """The search ends before it does."""
        ...

    def wait(self) -> None:
        """Until it has stopped."""
        ...


class Process:
    """A child of this process; slot: which of the devices are its."""

    def __init__(self, config: Config, slot: int) -> None:
        self._child: Any = processes.spawn(partial(processes.run_command, "fit"), config, visible(config, slot))

    @property
    def code(self) -> int | None:
        return None if self._child.is_alive() else processes.shell_code(self._child.exitcode)

    def give_up(self) -> None:
        if self._child.is_alive():
            os.kill(self._child.pid, signal.SIGTERM)

    def stop(self) -> None:
        self.give_up()

    def wait(self) -> None:
        self._child.join()


def visible(config: Config, slot: int) -> dict[str, str]:
    """Which devices the processes of a slot see; UserError when there are too few."""
    count = resolve.launch(config).processes
    if resolve.device(config).type != "cuda":
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    own = devices[slot * count :][:count]
    if len(own) < count:
        raise UserError(
            f"sweep.parallel={config.sweep.parallel} trials on {count} devices each need more than "
            f"the {len(devices)} of this machine: lower sweep.parallel, or set sweep.place=slurm"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


class Job:
    """A SLURM job from the template of `submit`, which saves, requeues and continues by itself."""

    def __init__(self, number: str) -> None:
        self._number, self._asked, self._code = number, 0.0, None

    @property
    def code(self) -> int | None:
        if self._code is None and time.monotonic() - self._asked > _ASK_S:
            self._asked = time.monotonic()
            self._code = _ended(self._number)
        return self._code

    def give_up(self) -> None:
        subprocess.run(["scancel", self._number], capture_output=True, check=False)

    def stop(self) -> None:
        """It goes on: the same search finds it again."""

    def wait(self) -> None:
        pass


def start(config: Config, slot: int, known: str | None) -> tuple[Running, str | None]:
    """A trial's process or job, and the job's number; known: the number of a job that may still be there."""
    if config.sweep.place == "local":
        return Process(config, slot), None
    if known is None or _shown(known).get("JobState") not in _ACTIVE:
        known = slurm.submit(slurm.write_script(config)).split(";")[0]
    return Job(known), known


def _ended(number: str) -> int | None:
    """The exit code of a job; None while it is in the queue. SLURM forgets ended jobs after some minutes."""
    shown = _shown(number)
    if shown.get("JobState") in _ACTIVE:
        return None
    code, _, ended_by = shown.get("ExitCode", f"{int(Exit.PREEMPTED)}:0").partition(":")
    return int(code) or (128 + int(ended_by) if int(ended_by or 0) else 0)


def _shown(number: str) -> dict[str, str]:
    """What SLURM says of a job; nothing when it knows none of that number."""
    done = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return {"JobState": "PENDING"}  # nobody answers: the job may go on all the same
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))
