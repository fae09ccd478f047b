"""Runs one trial of a search as a process of this machine or as a SLURM job.

Owns starting, finding and cancelling a trial, and its exit code. `search` decides which trials to run.
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

# Shortest time in seconds between two queries of a job's state.
_QUERY_S = 2.0
_ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED"}


class Running(Protocol):
    """A started trial. code: its exit code, None while it runs."""

    @property
    def code(self) -> int | None: ...

    def give_up(self) -> None:
        """Cancels the trial: its result is not needed any more."""
        ...

    def stop(self) -> None:
        """Called when the search ends before the trial."""
        ...

    def wait(self) -> None:
        """Waits until the trial has stopped."""
        ...


class Process:
    """A trial in a child process. slot: selects its devices."""

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
    """Environment variables that select the devices of a slot; UserError when the machine has too few."""
    count = resolve.launch(config).processes
    if resolve.device(config).type != "cuda":
        return {}
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = inherited.split(",") if inherited else [str(n) for n in range(torch.cuda.device_count())]
    slot_devices = devices[slot * count :][:count]
    if len(slot_devices) < count:
        raise UserError(
            f"sweep.parallel={config.sweep.parallel} trials on {count} devices each need more than "
            f"the {len(devices)} of this machine: lower sweep.parallel, or set sweep.place=slurm"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(slot_devices)}


class Job:
    """A trial in a SLURM job from the template of `submit`. The job saves, requeues and continues by itself."""

    def __init__(self, number: str) -> None:
        self._number, self._queried_at, self._code = number, 0.0, None

    @property
    def code(self) -> int | None:
        if self._code is None and time.monotonic() - self._queried_at > _QUERY_S:
            self._queried_at = time.monotonic()
            self._code = _exit_code(self._number)
        return self._code

    def give_up(self) -> None:
        subprocess.run(["scancel", self._number], capture_output=True, check=False)

    def stop(self) -> None:
        """Leaves the job running: the same search finds it again."""

    def wait(self) -> None:
        pass


def start(config: Config, slot: int, known: str | None) -> tuple[Running, str | None]:
    """Starts a trial. Returns its process or job, and the job's number.

    known: the number of the trial's earlier job, which is used while SLURM has it in the queue.
    """
    if config.sweep.place == "local":
        return Process(config, slot), None
    if known is None or _job_fields(known).get("JobState") not in _ACTIVE:
        known = slurm.submit(slurm.write_script(config)).split(";")[0]
    return Job(known), known


def _exit_code(number: str) -> int | None:
    """The exit code of a job; None while it is in the queue. SLURM drops ended jobs after some minutes."""
    fields = _job_fields(number)
    if fields.get("JobState") in _ACTIVE:
        return None
    code, _, ended_by = fields.get("ExitCode", f"{int(Exit.PREEMPTED)}:0").partition(":")
    return int(code) or (128 + int(ended_by) if int(ended_by or 0) else 0)


def _job_fields(number: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty when SLURM does not know the job."""
    done = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return {"JobState": "PENDING"}  # SLURM does not answer; the job may still be running
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))
