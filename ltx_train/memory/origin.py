"""Where streamed weights come from: this machine's memory, or the other ranks' devices, a share on each.

Owns what is kept of a block while it is not in the ring. A block is one flat buffer of bytes here; which
tensors lie in it is the stream's knowledge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ltx_train.memory.allocator import mappable
from ltx_train.memory.peers import Tell, reached
from ltx_train.memory.pinned import pinned

Collective = Callable[[Tensor, Tensor], None]
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Exchange:
    """What ranks give each other, in the order of the current stream; every rank must call it alike.

    gather(whole, share) fills `whole` with all ranks' shares by rank. scatter(share, whole) is the sum over the ranks
    of this rank's part of `whole`. total(values) becomes the sum over the ranks. tell(value) gives every rank's value
    on the host.
    """

    rank: int
    world: int
    gather: Collective
    scatter: Collective
    total: Callable[[Tensor], None]
    tell: Tell


class Origin(Protocol):
    """Keeps flat buffers by block, and fills memory on the device from them."""

    @property
    def largest(self) -> int:
        """Bytes that the largest kept block fills."""
        ...

    def room(self, size: int) -> Tensor:
        """At least `size` bytes to write a block into."""
        ...

    def keep(self, index: int, whole: Tensor) -> None:
        """Takes over what `room` gave, now written."""
        ...

    def send(self, index: int, memory: Tensor) -> None:
        """Fills the beginning of `memory` with a kept block, in the order of the current stream."""
        ...

    def matches(self, index: int, memory: Tensor) -> bool:
        """Whether `memory` begins with the block as it was kept."""
        ...


class HostOrigin:
    """Whole blocks in page-locked host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._masters: dict[int, Tensor] = {}

    @property
    def largest(self) -> int:
        return max((m.numel() for m in self._masters.values()), default=0)

    def room(self, size: int) -> Tensor:
        return pinned(size, self._device)

    def keep(self, index: int, whole: Tensor) -> None:
        self._masters[index] = whole

    def send(self, index: int, memory: Tensor) -> None:
        master = self._masters[index]
        memory[: master.numel()].copy_(master, non_blocking=True)

    def matches(self, index: int, memory: Tensor) -> bool:
        master = self._masters[index]
        return torch.equal(memory[: master.numel()].cpu(), master)


class PeerOrigin:
    """A share of every block on each rank's own device (ZeRO-3); sending brings the shares together: by copies from
    the other devices' memory where that can be reached, which takes none of the processors that compute, else by a
    collective.

    Every rank must send the same blocks in the same order. No rank ever holds more than its shares, the block that is
    being loaded, and the ring.
    """

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device
        self._shares: dict[int, Tensor] = {}
        self._sums: dict[int, int] = {}
        self._reached: dict[int, list[Tensor]] | None = None
        self._asked = False

    @property
    def largest(self) -> int:
        return max((self._exchange.world * s.numel() for s in self._shares.values()), default=0)

    @property
    def direct(self) -> bool:
        """Whether the other devices' memory is read."""
        return self._reached is not None

    def room(self, size: int) -> Tensor:
        step = self._exchange.world * ALIGNMENT
        return torch.zeros(-(-size // step) * step, dtype=torch.uint8, device=self._device)

    def keep(self, index: int, whole: Tensor) -> None:
        with mappable():
            self._shares[index] = whole.chunk(self._exchange.world)[self._exchange.rank].clone()
        # Taken while the whole block is here for the last time.
        self._sums[index] = _checksum(whole)

    def send(self, index: int, memory: Tensor) -> None:
        share, world = self._shares[index], self._exchange.world
        if not self._asked:
            self._asked = True
            self._reached = reached(self._shares, self._exchange.rank, self._device, self._exchange.tell)
        parts = memory[: world * share.numel()].chunk(world)
        if self._reached is None:
            self._exchange.gather(memory[: world * share.numel()], share)
            return
        for turn in range(world):  # each begins with another one
            rank = (self._exchange.rank + turn) % world
            parts[rank].copy_(self._reached[index][rank], non_blocking=True)

    def matches(self, index: int, memory: Tensor) -> bool:
        """As it was loaded, or, where shares have been changed, as it is now."""
        given = memory[: self._exchange.world * self._shares[index].numel()]
        if index in self._sums:
            return _checksum(given) == self._sums[index]
        again = torch.empty_like(given)
        self.send(index, again)
        return torch.equal(again, given)

    def share(self, index: int) -> Tensor:
        """This rank's bytes of a block, to be read, or changed while no rank sends."""
        return self._shares[index]

    def changed(self) -> None:
        """Shares are not what was loaded any more."""
        self._sums.clear()


def _checksum(memory: Tensor) -> int:
    """Of words and their places: blocks differ in every part that the ranks hold. As words, because torch makes a copy
    of what it sums in another type: eight times a block."""
    parts = memory.view(torch.int64).view(-1, ALIGNMENT // 8).sum(dim=1)
    return int((parts * torch.arange(1, len(parts) + 1, device=memory.device)).sum())
