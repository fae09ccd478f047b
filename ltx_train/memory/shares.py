"""Trained weights shared out over ranks (ZeRO): whole in the model's dtype where they are computed with, otherwise
one share on each rank, in float32.

Owns the flat layout of a unit (a block, or what lies outside the blocks), this rank's masters, and the ways there
and back: shares become weights, gradients become a share of their mean. The optimizer sees the masters alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltx_train.memory.allocator import mappable
from ltx_train.memory.host import Host, accumulate, norm
from ltx_train.memory.origin import ALIGNMENT, Exchange, PeerOrigin
from ltx_train.memory.peers import PeerSums
from ltx_train.memory.stream import WeightStream

_GRADIENT_SLOTS = 2


class Place(NamedTuple):
    """One parameter inside its unit's flat buffer, which begins there at element `start`."""

    name: str
    parameter: nn.Parameter
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that travel together; size: elements, padded to equal shares. whole: where they lie between steps,
    None for a unit that is gathered for each pass."""

    places: list[Place]
    size: int
    whole: Tensor | None


@dataclass
class _Slot:
    """Memory that gradients are sent from."""

    memory: Tensor
    freed: Any


class _Layout(NamedTuple):
    """A unit's gradient in its slot: by parameter, and what lies between them."""

    slot: int
    parts: list[Tensor]
    gaps: list[Tensor]


class Shares:
    """Masters of the trained weights, by unit. dtype: of the weights that the model computes with, and of their
    gradients on the way. host: masters and summed gradients live in host memory. Every rank must call it alike and in
    the same order."""

    def __init__(
        self, exchange: Exchange, device: torch.device, dtype: torch.dtype, *, host: Host | None = None
    ) -> None:
        self.exchange, self.device, self.dtype, self._host = exchange, device, dtype, host
        self.units: dict[str, Unit] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self._streamed: dict[str, Tensor] = {}
        self._ring: tuple[WeightStream, PeerOrigin] | None = None
        self._cuda = device.type == "cuda"
        self._aside: Any = torch.cuda.Stream(device) if self._cuda else None
        self._slots: list[_Slot] = []
        self._layouts: dict[str, _Layout] = {}
        self._sums: PeerSums | None = None

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every trained parameter with its name, in the order of the units."""
        return [(place.name, place.parameter) for unit in self.units.values() for place in unit.places]

    def hold(self, name: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Makes a unit that stays whole on every rank: the parameters become parts of one buffer."""
        places: list[Place] = []
        end = 0
        for own, parameter in parameters:
            places.append(Place(own, parameter, end, parameter.shape))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        # Shares of equal length on every rank, and aligned.
        step = ALIGNMENT * self.exchange.world
        whole = torch.zeros(-(-end // step) * step, dtype=self.dtype, device=self.device)
        for place in places:
            part = whole[place.start : place.stop]
            part.copy_(place.parameter.detach().reshape(-1))
            place.parameter.data = part.view(place.shape)
        self.units[name] = Unit(places, whole.numel(), whole)
        self.masters[name] = self._master(name, whole.chunk(self.exchange.world)[self.exchange.rank])

    def bind(self, name: str, block: nn.Module, index: int, stream: WeightStream, origin: PeerOrigin) -> None:
        """Makes a unit of a streamed block, whose present weights the origin keeps a share of."""
        names = {id(module): f"{name}.{own}" if own else name for own, module in block.named_modules()}
        size = torch.empty(0, dtype=self.dtype).element_size()
        places: list[Place] = []
        for place in stream.places(index):
            parameter = getattr(place.owner, place.name)
            assert place.dtype == self.dtype
            places.append(Place(f"{names[id(place.owner)]}.{place.name}", parameter, place.offset // size, place.shape))
        share = origin.share(index).view(self.dtype)
        self.units[name] = Unit(places, share.numel() * self.exchange.world, None)
        self.masters[name] = self._master(name, share)
        self._streamed[name] = share
        self._ring = (stream, origin)

    def ready(self) -> None:
        """Memory that gradients are sent from; every unit is there. Each unit always has the same slot."""
        largest = max(unit.size for unit in self.units.values())
        for _ in range(min(_GRADIENT_SLOTS, len(self.units))):
            with mappable():
                # The other ranks' devices read it.
                memory = torch.zeros(largest, dtype=self.dtype, device=self.device)
            self._slots.append(_Slot(memory, torch.cuda.Event() if self._cuda else None))
        for number, (name, unit) in enumerate(self.units.items()):
            slot = number % len(self._slots)
            memory = self._slots[slot].memory
            parts = [memory[p.start : p.stop].view(p.shape) for p in unit.places]
            ends = [0, *(p.stop for p in unit.places)]
            begins = [*(p.start for p in unit.places), unit.size]
            # Between parameters there must be zeros: they are summed, and count in the norm.
            gaps = [memory[end:begin] for end, begin in zip(ends, begins, strict=True) if end < begin]
            self._layouts[name] = _Layout(slot, parts, gaps)
        exchange = self.exchange
        self._sums = PeerSums.over([s.memory for s in self._slots], exchange.rank, exchange.world, exchange.tell)

    def reduce(self, name: str, *, in_place: bool = False) -> None:
        """Adds a share of the ranks' mean gradient to the master's, and drops the parameters' own; in_place: zeroes
        them where they are."""
        unit = self.units[name]
        number, parts, gaps = self._layouts[name]
        flat, freed = self._slots[number].memory[: unit.size], self._slots[number].freed
        if freed is not None:
            torch.cuda.current_stream(self.device).wait_event(freed)
        given = zip(parts, [place.parameter.grad for place in unit.places], strict=True)
        present = [(part, gradient) for part, gradient in given if gradient is not None]
        if len(present) < len(unit.places):
            # A parameter that the pass did not use: what the slot held is another unit's.
            flat.zero_()
        elif gaps:
            torch._foreach_zero_(gaps)
        if present:
            targets, gradients = (list(column) for column in zip(*present, strict=True))
            torch._foreach_copy_(targets, gradients)
            if in_place:
                torch._foreach_zero_(gradients)
        if not in_place:
            for place in unit.places:
                place.parameter.grad = None
        if self._cuda:
            self._aside.wait_stream(torch.cuda.current_stream(self.device))
        with self._beside():
            share = self._summed(number, flat)
            if self._host is None:
                self._add(name, share)
            else:
                self._host.take(name, share, self._add)
            if freed is not None:
                freed.record()

    def fork(self) -> None:
        """Sending becomes part of the CUDA graph that is being recorded, where earlier events mean nothing."""
        self._aside.wait_stream(torch.cuda.current_stream(self.device))
        for slot in self._slots:
            slot.freed = torch.cuda.Event()
            slot.freed.record()

    def join(self) -> None:
        """The recording ends behind what was sent; the events within it end with it."""
        torch.cuda.current_stream(self.device).wait_stream(self._aside)
        for slot in self._slots:
            slot.freed = torch.cuda.Event()

    def settle(self) -> None:
        """The masters' gradients are complete for what the current stream does next, and nothing reads the shares."""
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_stream(self._aside)
        if self._host is not None:
            self._host.settle(self._add)
        if self._ring is not None:
            self._ring[0].settle()

    def norm(self) -> Tensor:
        """Of the whole gradient, over all ranks' shares: float32, on the device."""
        gradients = self._gradients()
        norms = [norm(g) for g in gradients] if self._host is not None else torch._foreach_norm(gradients)
        squares = torch.stack(list(norms)).square().sum().to(self.device)
        self.exchange.total(squares)
        return squares.sqrt()

    def scale(self, factor: Tensor) -> None:
        gradients = self._gradients()
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def forget(self) -> None:
        """Gradients begin again."""
        torch._foreach_zero_(self._gradients())

    def lay_out(self, optimizer: torch.optim.Optimizer, kinds: Iterable[str]) -> None:
        """Moments of these kinds lie where the masters do, where that is not for the optimizer to choose."""
        if self._host is None:
            return
        for name, master in self.masters.items():
            moments = {k: self._host.room(f"{name}/{k}", torch.zeros_like(master)) for k in kinds}
            optimizer.state[master] = {"step": torch.tensor(0.0), **moments}

    def publish(self) -> None:
        """After the masters have changed: the weights follow."""
        for name, unit in self.units.items():
            if unit.whole is not None:
                self.exchange.gather(unit.whole, self._cast(self.masters[name].detach()))
        if self._ring is None:
            return
        names = list(self._streamed)
        if self._host is None:
            torch._foreach_copy_([self._streamed[n] for n in names], [self.masters[n].detach() for n in names])
        else:
            for name in names:
                self._host.send(self.masters[name].detach(), self._streamed[name])
        stream, origin = self._ring
        origin.changed()
        self.exchange.total(torch.zeros(1, device=self.device))  # every rank's shares are new before one is read
        stream.refresh()

    def _cast(self, master: Tensor) -> Tensor:
        """As the weights are, on the device."""
        if self._host is None:
            return master.to(self.dtype)
        weights = torch.empty(len(master), dtype=self.dtype, device=self.device)
        self._host.send(master, weights)
        return weights

    def _master(self, name: str, share: Tensor) -> nn.Parameter:
        value = share.detach().float().clone() if self._host is None else self._host.room(f"{name}/master", share)
        master = nn.Parameter(value)
        master.grad = torch.zeros_like(master)
        return master

    def _add(self, name: str, share: Tensor) -> None:
        gradient = self.masters[name].grad
        assert gradient is not None
        if self._host is None:
            gradient.add_(share, alpha=1 / self.exchange.world)
        else:
            accumulate(gradient, share, 1 / self.exchange.world)

    def _gradients(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def _summed(self, number: int, flat: Tensor) -> Tensor:
        """This rank's part of the ranks' sum."""
        dtype = torch.float32 if self._sums is not None and self._host is None else self.dtype
        share = torch.empty(len(flat) // self.exchange.world, dtype=dtype, device=self.device)
        if self._sums is None:
            self.exchange.scatter(share, flat)
        else:
            self._sums(number, len(flat), share)
        return share

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._aside) if self._cuda else nullcontext()
