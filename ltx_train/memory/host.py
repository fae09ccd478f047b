"""Host memory, or a fast disk, for what the optimizer keeps of shared weights.

Owns where these tensors lie, how gradients get there and how changed weights get back; the update is their user's.
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

# torch takes memory for whole operands of another type: pieces of this many elements are given it out of what the
# process has, larger ones by the system, which takes twenty times as long as the sum.
_PIECE = 2**20
_SENT = 2**24  # elements that travel at once
_ROW = 4096


class _Slot(NamedTuple):
    """memory: what is page-locked while it lives; values: what lies in it; arrived: the newest copy."""

    memory: Tensor
    values: Tensor
    arrived: Any


class Host:
    """folder: where files stand for the memory, one folder for each rank; None for memory itself."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._staged: dict[str, _Slot] = {}
        self._waiting: list[str] = []
        self._sending: list[_Slot] = []

    def room(self, name: str, like: Tensor) -> Tensor:
        """float32 with the values of `like`; DataError when the disk has no room for it."""
        if self._folder is None:
            return like.detach().to("cpu", torch.float32, copy=True)
        file = self._folder / f"{name.replace('/', '.')}.f32"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as opened:  # a disk that is full later on would end the process without a word
                os.posix_fallocate(opened.fileno(), 0, 4 * like.numel())
        except OSError as error:
            raise DataError(f"strategy.offload: {file} cannot be made ({error})") from error
        mapped = torch.from_file(str(file), shared=True, size=like.numel(), dtype=torch.float32)
        return mapped.copy_(like.detach())

    def take(self, name: str, share: Tensor, add: Add) -> None:
        """Begins to copy a share of a gradient here; what of the same came before is added first."""
        if name in self._waiting:
            self._finish(name, add)
        if name not in self._staged:
            self._staged[name] = _slot(share, share.numel())
        slot = self._staged[name]
        slot.values.copy_(share, non_blocking=True)
        if slot.arrived is not None:
            slot.arrived.record()
        self._waiting.append(name)

    def settle(self, add: Add) -> None:
        """Adds all that is under way."""
        for name in list(self._waiting):
            self._finish(name, add)

    def send(self, master: Tensor, weights: Tensor) -> None:
        """Copies a master (N,) into weights (N,) of the device in their dtype; done for what the current stream does
        next."""
        if not self._sending:
            self._sending = [_slot(weights, _SENT) for _ in range(2)]
        for number, (source, target) in enumerate(zip(master.split(_SENT), weights.split(_SENT), strict=True)):
            slot = self._sending[number % 2]
            if slot.arrived is not None:
                slot.arrived.synchronize()
            target.copy_(slot.values[: len(source)].copy_(source), non_blocking=True)
            if slot.arrived is not None:
                slot.arrived.record()

    def _finish(self, name: str, add: Add) -> None:
        slot = self._staged[name]
        if slot.arrived is not None:
            slot.arrived.synchronize()
        add(name, slot.values)
        self._waiting.remove(name)


def _slot(like: Tensor, count: int) -> _Slot:
    memory = pinned(count * like.element_size(), like.device)
    return _Slot(memory, memory.view(like.dtype), torch.cuda.Event() if like.is_cuda else None)


def accumulate(total: Tensor, share: Tensor, weight: float) -> None:
    """total (N,) += weight * share (N,), both in host memory."""
    for whole, piece in zip(total.split(_PIECE), share.split(_PIECE), strict=True):
        whole.add_(piece, alpha=weight)


def norm(values: Tensor) -> Tensor:
    """Of values (N,) in host memory, by rows: over a whole tensor torch adds one by one, on a single thread, and is a
    percent off for a hundred million."""
    whole = len(values) // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    both = torch.cat([rows, torch.linalg.vector_norm(values[whole:]).view(1)])
    return torch.linalg.vector_norm(both, dtype=torch.float64).to(values.dtype)
