"""Ends a process that makes no progress, after writing the stack of every thread to a file.

When a rank hangs or dies, the other ranks wait in a collective until its timeout. The watchdog detects this.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from ltx_train.contracts import Exit


class Watchdog:
    """A context manager that ends the process with exit code 76 when no `beat` comes within the time limit.

    The limit is start_s until the first beat (loading, compiling) and after a patient one (validation, saving),
    otherwise step_s. Either of them set to 0 turns the watchdog off.
    """

    def __init__(self, folder: Path, rank: int, *, start_s: float, step_s: float) -> None:
        self._path = folder / "stacks" / f"rank-{rank}.txt"
        self._rank, self._start_s, self._step_s = rank, start_s, step_s
        self._limit, self._last = start_s, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

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
        self._last = time.monotonic()
        self._limit = self._start_s if patient else self._step_s

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
            f"ltx-train: rank {self._rank} made no progress for {waited:.0f} s; its stacks are in {self._path}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(Exit.HUNG)
