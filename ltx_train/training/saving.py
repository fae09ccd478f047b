"""Checkpoints written while training goes on: a snapshot now, the disk in a thread.

Owns what is in flight: one save at a time, whose outcome is asked for before the next one starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ltx_train.training import checkpointing
from ltx_train.training.checkpointing import Checkpoint

Publish = Callable[[int, Mapping[str, Tensor]], None]


class Saver:
    """Commits checkpoints into `folder`, then publishes their weights; both in the order they came. Of ranks that do
    not lead it takes their part of sharded ones."""

    def __init__(self, folder: Path, keep: int, publish: Publish, *, leads: bool = True) -> None:
        self._folder, self._keep, self._publish, self._leads = folder, keep, publish, leads
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self.blocked_s = 0.0

    def start(self, live: Checkpoint, protected: int | None = None) -> None:
        """Copies the state to host memory and returns; `settle` must have been called before.

        protected: a step whose checkpoint outlives the newest ones, the best so far.
        """
        assert self._running is None
        started = time.perf_counter()
        shard = live.shard and replace(live.shard, tensors=_copied(live.shard.tensors))
        still = replace(
            live, weights=_copied(live.weights), optimizer=_copied(live.optimizer), average=_copied(live.average),
            shard=shard,
        )  # fmt: skip
        self._running = self._writer.submit(self._write, still, protected)
        self.blocked_s = time.perf_counter() - started

    def settle(self) -> None:
        """Waits for the save in flight; raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Lets the save in flight come to its end."""
        self._writer.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint, protected: int | None) -> None:
        if not self._leads:
            checkpointing.contribute(self._folder, checkpoint)
            return
        checkpointing.save(self._folder, checkpoint, self._keep, protected)
        self._publish(checkpoint.step, checkpoint.published)


def _copied(value: Any) -> Any:
    """The same structure with every tensor copied to host memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
