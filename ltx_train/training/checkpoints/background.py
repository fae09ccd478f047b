"""Writes checkpoints during training: takes a snapshot at once and writes it to disk in a thread.

Owns the only save in flight. Its outcome is read before the next save starts.
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
    """Commits checkpoints into `folder`, then publishes their weights, both in the order of `start`. A rank
    other than 0 writes only its slice of the state."""

    def __init__(self, folder: Path, keep: int, publish: Publish, *, leads: bool = True) -> None:
        self._folder, self._keep, self._publish, self._leads = folder, keep, publish, leads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[None] | None = None
        self._preparing: Future[None] | None = None
        self._snapshot = Snapshot()

    def prepare(self, state_slice: StateSlice) -> Future[None]:
        """Allocates host memory for a sliced state in the background."""
        self._preparing = self._thread.submit(self._snapshot.prepare, state_slice.tensors, ("slice",))
        return self._preparing

    def start(self, live: Checkpoint, protected: int | None = None) -> None:
        """Copies the state to host memory, starts to write it and returns. Call `wait` between two starts.

        protected: the step of the best checkpoint so far, which is not pruned.

        The copy blocks the host thread of the current stream, so the snapshot holds the state of this step although
        the next step begins before the write ends. Only one save may be in flight, because its memory is reused.
        """
        assert self._running is None
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        copy_of = self._snapshot.of
        state_slice = live.slice and replace(live.slice, tensors=copy_of(live.slice.tensors, ("slice",)))
        frozen = replace(
            live, weights=copy_of(live.weights, ("weights",)), optimizer=copy_of(live.optimizer, ("optimizer",)),
            average=copy_of(live.average, ("average",)), slice=state_slice,
        )  # fmt: skip
        self._running = self._thread.submit(self._write, frozen, protected)

    def wait(self) -> None:
        """Waits for the save in flight and raises its exception, if any."""
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

    def of(self, value: Any, location: tuple[Any, ...]) -> Any:
        """Returns the same structure with every tensor copied to host memory. Overwrites the previous copy at the same
        location."""
        if isinstance(value, Tensor):
            return self._buffer(value, location).copy_(value.detach())
        if isinstance(value, Mapping):
            return {key: self.of(item, (*location, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, (*location, number)) for number, item in enumerate(value)]
        return value

    def prepare(self, tensors: Mapping[str, Mapping[str, Tensor]], location: tuple[Any, ...]) -> None:
        """Allocates buffers in advance and writes to them: the system provides pages only at the first write."""
        for name, kinds in tensors.items():
            for kind, tensor in kinds.items():
                self._buffer(tensor, (*location, name, kind)).zero_()

    def _buffer(self, tensor: Tensor, location: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(location)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[location] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return buffer
