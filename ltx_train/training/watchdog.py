"""Ends a process that makes no progress, after writing down where every thread stands.

A rank that waits for a stopped or lost one waits in a collective for as long as it is allowed to;
this is what notices.
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
    """`with Watchdog(...) as dog:` and `dog.beat()` at every sign of progress; exits 76 without one for `limit`.

    start_s holds until the first beat (loading, compiling) and while `patient` (validation, saving), step_s
    afterwards. 0 switches it off.
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
        """Progress; `patient`: what comes next may take as long as the start."""
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
            f"ltx-train: rank {self._rank} made no progress for {waited:.0f} s; where it stands is in {self._path}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(Exit.HUNG)
