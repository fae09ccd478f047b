"""Uploads of a run's folder to its store, in a thread beside the process that watches the run.

Owns when an upload starts and is repeated. A store that is slow or does not answer must delay neither a cloud's notice
nor a restart: only `finish`, after the end of the run, waits for it.
"""

from __future__ import annotations

import sys
import threading
import time

from ltx_train.contracts import StoreError
from ltx_train.training.checkpoints.mirror import RunStore

# Tries of the last upload, which nothing repeats.
_TRIES = 4
_LONGEST_WAIT_S = 300.0


class Uploads:
    """One upload at a time. keep: checkpoints that stay in the store; backoff_s: pause after a failed upload, doubled
    after each further one."""

    def __init__(self, store: RunStore, keep: int, backoff_s: float) -> None:
        self._store, self._keep, self._backoff_s = store, keep, backoff_s
        self._thread: threading.Thread | None = None
        # Newest step that the store has, failed uploads in a row, and when the next one may start.
        self._uploaded, self._failures, self._next = -1, 0, 0.0

    def offer(self, newest: int) -> None:
        """Starts an upload when the run has a newer checkpoint than the store. Never waits."""
        is_running = self._thread is not None and self._thread.is_alive()
        if is_running or newest == self._uploaded or time.monotonic() < self._next:
            return
        # A daemon: a store that does not answer must not keep this process from ending.
        self._thread = threading.Thread(target=self._upload, args=(newest,), name="uploads", daemon=True)
        self._thread.start()

    def finish(self, in_haste: bool) -> bool:
        """Uploads what is left. Returns whether the store has everything. in_haste: the machine may be gone in seconds.

        KeyboardInterrupt, from a second Ctrl-C, gives up.
        """
        try:
            if self._thread is not None:
                self._thread.join()
            self._failures = 0
            for attempt in range(_TRIES):
                if self._upload(None):
                    return True
                if attempt < _TRIES - 1:
                    time.sleep(1.0 if in_haste else self._pause())
        except KeyboardInterrupt:
            pass
        print("ltx-train: the run's last state is on this machine alone: supervise.store lacks it", file=sys.stderr)
        return False

    def _upload(self, newest: int | None) -> bool:
        try:
            self._store.push(self._keep)
        except (StoreError, OSError) as error:
            self._failures += 1
            self._next = time.monotonic() + self._pause()
            print(f"ltx-train: {error}; retrying later", file=sys.stderr)
            return False
        self._failures = 0
        if newest is not None:
            self._uploaded = newest
        return True

    def _pause(self) -> float:
        return min(_LONGEST_WAIT_S, self._backoff_s * 2 ** max(0, self._failures - 1))
