"""Checkpoints written while training goes on: a snapshot now, the disk in a thread.

Owns the save in flight: one at a time. Its outcome is read before the next one starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.updates.slice_files import StateSlice

Publish = Callable[[int, Mapping[str, Tensor]], None]


class Saver:
    """Commits checkpoints into `folder`, then publishes their weights, both in the order of `start`. A rank that does
    not lead writes its slice of the state."""

    def __init__(self, folder: Path, keep: int, publish: Publish, *, leads: bool = True) -> None:
        self._folder, self._keep, self._publish, self._leads = folder, keep, publish, leads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self._preparing: Future[None] | None = None
        self._snapshot = Snapshot()

    def prepare(self, own: StateSlice) -> Future[None]:
        """Allocates host memory for a sliced state in the background."""
        self._preparing = self._thread.submit(self._snapshot.prepare, own.tensors, ("slice",))
        return self._preparing

    def start(self, live: Checkpoint, protected: int | None = None) -> None:
        """Copies the state to host memory and returns. `wait` must have been called since the last start.

        protected: a step whose checkpoint is not pruned, the best so far.

        Order: the copy blocks the current stream's host thread, so the snapshot is the state of this step although the
        next step begins before the disk is done. The snapshot's memory is reused, which is why only one save may be in
        flight.
        """
        assert self._running is None
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        copied = self._snapshot.of
        own = live.slice and replace(live.slice, tensors=copied(live.slice.tensors, ("slice",)))
        still = replace(
            live, weights=copied(live.weights, ("weights",)), optimizer=copied(live.optimizer, ("optimizer",)),
            average=copied(live.average, ("average",)), slice=own,
        )  # fmt: skip
        self._running = self._thread.submit(self._write, still, protected)

    def wait(self) -> None:
        """Waits for the save in flight; raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Lets the save in flight finish."""
        self._thread.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint, protected: int | None) -> None:
        if not self._leads:
            commit.contribute(self._folder, checkpoint)
            return
        commit.save(self._folder, checkpoint, self._keep, protected)
        self._publish(checkpoint.step, checkpoint.published)


class Snapshot:
    """Host memory for copies of the state. Buffers are reused: allocating fresh host pages costs 15x the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def of(self, value: Any, place: tuple[Any, ...]) -> Any:
        """The same structure with every tensor copied to host memory. The copy of the same place before is
        overwritten."""
        if isinstance(value, Tensor):
            return self._buffer(value, place).copy_(value.detach())
        if isinstance(value, Mapping):
            return {key: self.of(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, (*place, number)) for number, item in enumerate(value)]
        return value

    def prepare(self, tensors: Mapping[str, Mapping[str, Tensor]], place: tuple[Any, ...]) -> None:
        """Allocates buffers in advance. They are written to, because the system provides pages at the first write."""
        for name, kinds in tensors.items():
            for kind, tensor in kinds.items():
                self._buffer(tensor, (*place, name, kind)).zero_()

    def _buffer(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        kept = self._buffers.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._buffers[place] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept
