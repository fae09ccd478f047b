"""Ends a process that makes no progress, after writing the stack of every thread to a file.

When a rank hangs or dies, the other ranks wait in a collective until its timeout. The watchdog detects this.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from ltx_train.contracts import Exit

# Steps whose median the limit follows, and from how many on.
_STEPS, _ENOUGH = 50, 5
# The limit in median steps, and the seconds that it never falls below: disks and stores stall for minutes.
_PATIENCE, _LEAST_S = 20.0, 180.0


class Watchdog:
    """A context manager that ends the process with exit code 76 when no `beat` comes within the time limit.

    The limit is start_s until the first beat (loading, compiling) and after a patient one (validation, saving).
    Otherwise it is step_s, which falls to twenty median steps, but not below three minutes, and rises where steps are
    so long that five of them exceed it. Either of the two set to 0 turns the watchdog off.
    """

    def __init__(self, folder: Path, rank: int, *, start_s: float, step_s: float) -> None:
        self._path = folder / "stacks" / f"rank-{rank}.txt"
        self._rank, self._start_s, self._step_s = rank, start_s, step_s
        self._limit, self._last, self._is_patient = start_s, time.monotonic(), True
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._awaited: Callable[[], str] = str
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def explain_with(self, awaited: Callable[[], str]) -> None:
        """`awaited()` returns in words what the process waits for, empty when that is not known. It must not wait
        itself, because the device may be stuck."""
        self._awaited = awaited

    def __enter__(self) -> Watchdog:
        if self._start_s > 0 and self._step_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def beat(self, *, patient: bool = False) -> None:
        """Reports progress. patient: the work until the next beat may take start_s."""
        now = time.monotonic()
        if patient and not self._is_patient:
            # What lies between an edge and the next is a step.
            self._steps.append(now - self._last)
        self._last, self._is_patient = now, patient
        self._limit = self._start_s if patient else step_limit(self._step_s, self._steps)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._step_s / 4)):
            waited = time.monotonic() - self._last
            if waited > self._limit:
                self._end(waited)

    def _end(self, waited: float) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w") as file:
            faulthandler.dump_traceback(file)
        print(
            f"ltx-train: rank {self._rank} made no progress for {waited:.0f} s; its stacks are in {self._path}"
            + "".join(f"; {text}" for text in [self._awaited()] if text),
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(Exit.HUNG)


def step_limit(step_s: float, steps: Sequence[float]) -> float:
    """Seconds that a step may take, from the durations of the last ones."""
    if len(steps) < _ENOUGH:
        return step_s
    median = statistics.median(steps)
    return min(max(_PATIENCE * median, min(_LEAST_S, step_s)), max(step_s, _PATIENCE / 4 * median))
