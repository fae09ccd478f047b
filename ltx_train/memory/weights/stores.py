"""Where the weights of streamed blocks are kept: in host memory, or as slices on the devices of all ranks.

Owns the copy of a block that exists while the block is not in the ring. A block is one flat buffer of bytes here;
the stream knows which tensors lie in it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ltx_train.distributed.allocator import mappable
from ltx_train.distributed.exchange import Exchange
from ltx_train.distributed.mapped_memory import MappedTensors, map_all_ranks
from ltx_train.memory.pinned import pinned

# Bytes. Tensors within a block begin at multiples of it, and a block's slices are multiples of it.
ALIGNMENT = 256


class WeightStore(Protocol):
    """Keeps flat buffers by block index and copies them to memory on the device."""

    @property
    def largest(self) -> int:
        """Size of the largest stored block in bytes."""
        ...

    def allocate(self, size: int) -> Tensor:
        """(>= size,) uint8 for a block's bytes. The caller fills it and passes it to `put`."""
        ...

    def put(self, index: int, buffer: Tensor) -> None:
        """Stores a filled buffer from `allocate`."""
        ...

    def copy_to(self, index: int, target: Tensor) -> None:
        """Copies a stored block to the beginning of `target`, in the order of the current stream."""
        ...

    def matches(self, index: int, target: Tensor) -> bool:
        """Whether `target` begins with the stored block."""
        ...


class HostStore:
    """Whole blocks in pinned host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[int, Tensor] = {}

    @property
    def largest(self) -> int:
        return max((block.numel() for block in self._blocks.values()), default=0)

    def allocate(self, size: int) -> Tensor:
        return pinned(size, self._device)

    def put(self, index: int, buffer: Tensor) -> None:
        self._blocks[index] = buffer

    def copy_to(self, index: int, target: Tensor) -> None:
        block = self._blocks[index]
        target[: block.numel()].copy_(block, non_blocking=True)

    def matches(self, index: int, target: Tensor) -> bool:
        block = self._blocks[index]
        return torch.equal(target[: block.numel()].cpu(), block)


class PeerStore:
    """One slice of every block on each rank's device (ZeRO-3). `copy_to` is the all-gather of a block.

    All ranks are on one machine. The slices are copied out of the other devices' mapped memory by copy engines, which
    leaves all streaming multiprocessors to the computation. Where memory cannot be mapped (`refusal`) a collective
    gathers them. Every rank copies the same blocks in the same order. A rank holds its slices, the ring, and while
    loading one whole block.
    """

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device
        self._slices: dict[int, Tensor] = {}
        self._checksums: dict[int, int] = {}
        # By block, the slices of all ranks by rank; None before the first copy.
        self._mapping: MappedTensors | None = None

    @property
    def largest(self) -> int:
        return max((self._exchange.world * s.numel() for s in self._slices.values()), default=0)

    @property
    def direct(self) -> bool:
        """Whether blocks are copied out of the other devices' mapped memory."""
        return self._mapping is not None and self._mapping.tensors is not None

    @property
    def refusal(self) -> str:
        """Why a collective gathers the blocks of GPUs; empty where they are copied."""
        return "" if self._mapping is None or self._device.type != "cuda" else self._mapping.refusal

    def allocate(self, size: int) -> Tensor:
        step = self._exchange.world * ALIGNMENT
        return torch.zeros(-(-size // step) * step, dtype=torch.uint8, device=self._device)

    def put(self, index: int, buffer: Tensor) -> None:
        with mappable():
            self._slices[index] = buffer.chunk(self._exchange.world)[self._exchange.rank].clone()
        # The whole block exists on this rank for the last time here.
        self._checksums[index] = _checksum(buffer)

    def copy_to(self, index: int, target: Tensor) -> None:
        """The first call is collective on the host too: the ranks exchange memory handles in it."""
        own, world = self._slices[index], self._exchange.world
        # Handles are exchanged at the first copy because only then every rank has stored all its blocks.
        if self._mapping is None:
            exchange = self._exchange
            self._mapping = map_all_ranks(self._slices, exchange.rank, self._device, exchange.gather_objects)
        whole, mapped = target[: world * own.numel()], self._mapping.tensors
        if mapped is None:
            self._exchange.all_gather(whole, own)
            return
        parts = whole.chunk(world)
        # Rank r begins with its own slice and goes on with r + 1: at no moment do all ranks read one device's link.
        for turn in range(world):
            rank = (self._exchange.rank + turn) % world
            parts[rank].copy_(mapped[index][rank], non_blocking=True)

    def matches(self, index: int, target: Tensor) -> bool:
        """Compares with the block as it was loaded or, after `slices_changed`, with a second copy of it."""
        whole = target[: self._exchange.world * self._slices[index].numel()]
        if index in self._checksums:
            return _checksum(whole) == self._checksums[index]
        second = torch.empty_like(whole)
        self.copy_to(index, second)
        return torch.equal(second, whole)

    def own_slice(self, index: int) -> Tensor:
        """This rank's bytes of a block. They may be changed while no rank copies the block."""
        return self._slices[index]

    def slices_changed(self) -> None:
        """The optimizer has changed the slices: checksums from loading no longer hold."""
        self._checksums.clear()


def _checksum(buffer: Tensor) -> int:
    """Position-weighted checksum over int64 words.

    The weights tell equal slices in another order apart. Summing int64 as int64 avoids torch's temporary copy in a
    wider type, which would be eight times the block.
    """
    rows = buffer.view(torch.int64).view(-1, ALIGNMENT // 8).sum(dim=1)
    return int((rows * torch.arange(1, len(rows) + 1, device=buffer.device)).sum())
