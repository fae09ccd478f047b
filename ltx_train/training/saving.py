"""Checkpoints written while training goes on: a snapshot now, the disk in a thread.

Owns what is in flight: one save at a time, whose outcome is asked for before the next one starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.training import checkpointing
from ltx_train.training.checkpointing import Checkpoint
from ltx_train.training.shards import Shard

Publish = Callable[[int, Mapping[str, Tensor]], None]


class Saver:
    """Commits checkpoints into `folder`, then publishes their weights; both in the order they came. Of ranks that do
    not lead it takes their part of sharded ones."""

    def __init__(self, folder: Path, keep: int, publish: Publish, *, leads: bool = True) -> None:
        self._folder, self._keep, self._publish, self._leads = folder, keep, publish, leads
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self._preparing: Future[None] | None = None
        self._snapshot = Snapshot()

    def prepare(self, shard: Shard) -> Future[None]:
        """Makes the host memory ready that a sharded state will be copied into, while training goes on."""
        self._preparing = self._writer.submit(self._snapshot.prepare, shard.tensors, ("shard",))
        return self._preparing

    def start(self, live: Checkpoint, protected: int | None = None) -> None:
        """Copies the state to host memory and returns; `settle` must have been called before.

        protected: a step whose checkpoint outlives the newest ones, the best so far.
        """
        assert self._running is None
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        taken = self._snapshot.of
        shard = live.shard and replace(live.shard, tensors=taken(live.shard.tensors, ("shard",)))
        still = replace(
            live, weights=taken(live.weights, ("weights",)), optimizer=taken(live.optimizer, ("optimizer",)),
            average=taken(live.average, ("average",)), shard=shard,
        )  # fmt: skip
        self._running = self._writer.submit(self._write, still, protected)

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


class Snapshot:
    """Host memory that the state is copied into, kept from one save to the next: to be given it by the system takes
    fifteen times as long as the copy."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[Any, ...], Tensor] = {}

    def of(self, value: Any, place: tuple[Any, ...]) -> Any:
        """The same structure with every tensor copied to host memory; what was taken at the same place before is
        overwritten."""
        if isinstance(value, Tensor):
            return self._room(value, place).copy_(value.detach())
        if isinstance(value, Mapping):
            return {key: self.of(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, (*place, number)) for number, item in enumerate(value)]
        return value

    def prepare(self, tensors: Mapping[str, Mapping[str, Tensor]], place: tuple[Any, ...]) -> None:
        """Memory for these, before they are taken: the system gives it when it is first written to."""
        for name, kinds in tensors.items():
            for kind, tensor in kinds.items():
                self._room(tensor, (*place, name, kind)).zero_()

    def _room(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        kept = self._rooms.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._rooms[place] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept
