"""Host memory, or files on a fast disk, for the optimizer state of sliced weights.

Owns where masters and moments lie, how gradient slices get there and how changed weights get back. The update itself
is the optimizer's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.memory.pinned import pinned

Add = Callable[[str, Tensor], None]

# Elements. torch casts whole operands into temporary memory; memory for pieces of this size is reused by the process,
# larger pieces come from the system, which takes twenty times as long as the sum.
_PIECE = 2**20
_SENT = 2**24  # elements of one copy to the device
_ROW = 4096


class _StagingSlot(NamedTuple):
    """memory: the pinned tensor, which stays pinned while this object lives; values: a view of it in the data's dtype;
    arrived: the event of the newest copy, None on a CPU."""

    memory: Tensor
    values: Tensor
    arrived: Any


class StateOffload:
    """folder: a folder for each rank whose files are mapped as memory; None: plain host memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._staging: dict[str, _StagingSlot] = {}
        self._pending: list[str] = []
        self._sending: list[_StagingSlot] = []

    def allocate(self, name: str, like: Tensor) -> Tensor:
        """Float32 host memory with the values of `like` (N,); DataError when the disk has no space for it."""
        if self._folder is None:
            return like.detach().to("cpu", torch.float32, copy=True)
        path = self._folder / f"{name.replace('/', '.')}.f32"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:  # a disk that fills up later would end the process with SIGBUS
                os.posix_fallocate(file.fileno(), 0, 4 * like.numel())
        except OSError as error:
            raise DataError(f"strategy.offload: {path} cannot be made ({error})") from error
        mapped = torch.from_file(str(path), shared=True, size=like.numel(), dtype=torch.float32)
        return mapped.copy_(like.detach())

    def add_gradient(self, name: str, gradient: Tensor, add: Add) -> None:
        """Starts an asynchronous copy of a unit's gradient slice to the host, after accumulating the unit's previous
        one with `add(name, values)`."""
        if name in self._pending:
            self._accumulate(name, add)
        if name not in self._staging:
            self._staging[name] = _staging_slot(gradient, gradient.numel())
        slot = self._staging[name]
        slot.values.copy_(gradient, non_blocking=True)
        if slot.arrived is not None:
            slot.arrived.record()
        self._pending.append(name)

    def wait_for_gradients(self, add: Add) -> None:
        """Accumulates every gradient slice that is still being copied."""
        for name in list(self._pending):
            self._accumulate(name, add)

    def send(self, master: Tensor, weights: Tensor) -> None:
        """Copies a master (N,) from the host into weights (N,) on the device, cast to their dtype, in the order of the
        current stream."""
        if not self._sending:
            self._sending = [_staging_slot(weights, _SENT) for _ in range(2)]
        for number, (source, target) in enumerate(zip(master.split(_SENT), weights.split(_SENT), strict=True)):
            slot = self._sending[number % 2]
            # The host may overwrite a staging slot only after the device has read it.
            if slot.arrived is not None:
                slot.arrived.synchronize()
            target.copy_(slot.values[: len(source)].copy_(source), non_blocking=True)
            if slot.arrived is not None:
                slot.arrived.record()

    def _accumulate(self, name: str, add: Add) -> None:
        slot = self._staging[name]
        if slot.arrived is not None:
            slot.arrived.synchronize()
        add(name, slot.values)
        self._pending.remove(name)


def _staging_slot(like: Tensor, count: int) -> _StagingSlot:
    memory = pinned(count * like.element_size(), like.device)
    return _StagingSlot(memory, memory.view(like.dtype), torch.cuda.Event() if like.is_cuda else None)


def accumulate(total: Tensor, values: Tensor, weight: float) -> None:
    """total (N,) += weight * values (N,), both in host memory."""
    for whole, piece in zip(total.split(_PIECE), values.split(_PIECE), strict=True):
        whole.add_(piece, alpha=weight)


def norm(values: Tensor) -> Tensor:
    """The Euclidean norm of values (N,) in host memory, summed by rows.

    Over a whole tensor torch adds element by element on one thread, and is one percent off for 1e8 elements.
    """
    whole = len(values) // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    both = torch.cat([rows, torch.linalg.vector_norm(values[whole:]).view(1)])
    return torch.linalg.vector_norm(both, dtype=torch.float64).to(values.dtype)
