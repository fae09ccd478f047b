"""Trained weights sliced over ranks (ZeRO): whole in the model's dtype where they are computed with, otherwise one
float32 slice of masters on each rank.

Owns the flat layout of a unit (a block, or everything outside the blocks), this rank's masters, and both directions:
masters become weights (all-gather), gradients become a slice of their mean (reduce-scatter). The optimizer sees the
masters alone. A unit is one flat buffer:

    | parameter 0 | pad | parameter 1 | pad | ...  | parameter n | pad |
    |<------- slice of rank 0 ------->|<------- slice of rank 1 ------>|

Parameters begin at multiples of ALIGNMENT, counted in **elements** here (the weight stream counts its offsets in
bytes). The buffer is padded to equal slices, so a parameter may lie in several slices and a slice may end within one.
Padding is zero in weights and must be zero in gradients: it is summed and counts in the norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltx_train.distributed.allocator import mappable
from ltx_train.distributed.exchange import Exchange
from ltx_train.distributed.mapped_memory import PeerSums
from ltx_train.memory.weights.flat_blocks import ParameterPlace
from ltx_train.memory.weights.stores import ALIGNMENT, PeerStore
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.updates.state_offload import StateOffload, accumulate, norm

_GRADIENT_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parameters that are gathered and reduced together.

    size: elements, padded to equal slices. whole: the weights between steps, None for a unit that the weight stream
    gathers for each pass.
    """

    places: list[ParameterPlace]
    size: int
    whole: Tensor | None


@dataclass
class _GradientSlot:
    """Device memory that gradients are reduced from. free: recorded when no stream reads it any more."""

    memory: Tensor
    free: Any


class _GradientLayout(NamedTuple):
    """A unit's gradient in its slot: views by parameter, and views of the padding between them."""

    slot: int
    parts: list[Tensor]
    padding: list[Tensor]


class SlicedParameters:
    """Masters of the trained weights, by unit. Every rank calls every method in the same order.

    dtype: of the weights that the model computes with, and of their gradients until they are summed. offload: where
    masters and summed gradients live if not on the device.
    """

    def __init__(
        self, exchange: Exchange, device: torch.device, dtype: torch.dtype, *, offload: StateOffload | None = None
    ) -> None:
        self.exchange, self.device, self.dtype, self._offload = exchange, device, dtype, offload
        self.units: dict[str, Unit] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self._streamed: dict[str, Tensor] = {}
        self._ring: tuple[WeightStream, PeerStore] | None = None
        self._cuda = device.type == "cuda"
        self._side: Any = torch.cuda.Stream(device) if self._cuda else None
        self._slots: list[_GradientSlot] = []
        self._layouts: dict[str, _GradientLayout] = {}
        self._sums: PeerSums | None = None
        # Why a collective sums the gradients of GPUs; empty where mapped memory is summed.
        self.refusal = ""

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every trained parameter with its name, in the order of the units."""
        return [(place.name, place.parameter) for unit in self.units.values() for place in unit.places]

    def add_resident(self, name: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Makes a unit that stays whole on every rank; the parameters become views of its buffer."""
        places: list[ParameterPlace] = []
        end = 0
        for own, parameter in parameters:
            places.append(ParameterPlace(own, parameter, end, parameter.shape))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        # Equal and aligned slices on every rank.
        step = ALIGNMENT * self.exchange.world
        whole = torch.zeros(-(-end // step) * step, dtype=self.dtype, device=self.device)
        for place in places:
            part = whole[place.start : place.stop]
            part.copy_(place.parameter.detach().reshape(-1))
            place.parameter.data = part.view(place.shape)
        self.units[name] = Unit(places=places, size=whole.numel(), whole=whole)
        self.masters[name] = self._master(name, whole.chunk(self.exchange.world)[self.exchange.rank])

    def add_streamed(self, name: str, block: nn.Module, index: int, stream: WeightStream, store: PeerStore) -> None:
        """Makes a unit of a streamed block, of whose weights the store keeps this rank's slice."""
        names = {id(module): f"{name}.{own}" if own else name for own, module in block.named_modules()}
        size = torch.empty(0, dtype=self.dtype).element_size()
        places: list[ParameterPlace] = []
        for place in stream.places(index):
            parameter = getattr(place.owner, place.name)
            assert place.dtype == self.dtype
            full_name = f"{names[id(place.owner)]}.{place.name}"
            places.append(ParameterPlace(full_name, parameter, place.offset // size, place.shape))
        own = store.own_slice(index).view(self.dtype)
        self.units[name] = Unit(places=places, size=own.numel() * self.exchange.world, whole=None)
        self.masters[name] = self._master(name, own)
        self._streamed[name] = own
        self._ring = (stream, store)

    def prepare_gradients(self) -> None:
        """Allocates the memory that gradients are reduced from; call it after the last unit was added.

        Units take the slots in turn and always the same one, so that a CUDA graph can replay `reduce`.
        """
        largest = max(unit.size for unit in self.units.values())
        for _ in range(min(_GRADIENT_SLOTS, len(self.units))):
            with mappable():
                # The other ranks' devices read it.
                memory = torch.zeros(largest, dtype=self.dtype, device=self.device)
            self._slots.append(_GradientSlot(memory, torch.cuda.Event() if self._cuda else None))
        for number, (name, unit) in enumerate(self.units.items()):
            slot = number % len(self._slots)
            memory = self._slots[slot].memory
            parts = [memory[p.start : p.stop].view(p.shape) for p in unit.places]
            ends = [0, *(p.stop for p in unit.places)]
            begins = [*(p.start for p in unit.places), unit.size]
            padding = [memory[end:begin] for end, begin in zip(ends, begins, strict=True) if end < begin]
            self._layouts[name] = _GradientLayout(slot, parts, padding)
        exchange = self.exchange
        self._sums, self.refusal = PeerSums.over(
            [s.memory for s in self._slots], exchange.rank, exchange.world, exchange.gather_objects
        )

    def awaited(self) -> str:
        """What this rank's device waits for, in words; empty for nothing that is known."""
        return "" if self._sums is None else self._sums.awaited()

    def reduce(self, name: str, *, in_place: bool = False) -> None:
        """Reduce-scatter of one unit: adds this rank's slice of the mean gradient to the master's gradient.

        The parameters' own gradients are dropped, or zeroed where they are (in_place).

        For blocks it is called by the marker at the end of the block's backward, on autograd's thread. The current
        stream copies gradients into the slot; the side stream reduces it while the next block computes:

            current:  wait(free)  copy unit 7 into slot 1        copy unit 6 into slot 0 ...
            side:                 wait(current)  reduce slot 1, record(free)  ...
        """
        unit = self.units[name]
        slot = self._slots[self._layouts[name].slot]
        if slot.free is not None:
            # The slot's previous unit must be reduced before its memory is overwritten.
            torch.cuda.current_stream(self.device).wait_event(slot.free)
        self._stage(name, in_place=in_place)
        if self._cuda:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_side_stream():
            own = self._reduced(self._layouts[name].slot, slot.memory[: unit.size])
            if self._offload is None:
                self._add(name, own)
            else:
                self._offload.add_gradient(name, own, self._add)
            if slot.free is not None:
                slot.free.record()

    def _stage(self, name: str, *, in_place: bool) -> None:
        """Copies a unit's gradients into its slot, with zeros for what has none."""
        unit, (number, parts, padding) = self.units[name], self._layouts[name]
        pairs = zip(parts, [place.parameter.grad for place in unit.places], strict=True)
        present = [(part, gradient) for part, gradient in pairs if gradient is not None]
        if len(present) < len(unit.places):
            # The pass did not use some parameter: the slot holds another unit's values there.
            self._slots[number].memory[: unit.size].zero_()
        elif padding:
            # Cleared every time and not only after another unit used the slot: a replay of a CUDA graph repeats the
            # recorded kernels and runs no Python that could tell.
            torch._foreach_zero_(padding)
        if present:
            targets, gradients = (list(column) for column in zip(*present, strict=True))
            torch._foreach_copy_(targets, gradients)
            if in_place:
                torch._foreach_zero_(gradients)
        if not in_place:
            for place in unit.places:
                place.parameter.grad = None

    def fork(self) -> None:
        """Begins the side stream's part of a CUDA graph. Events from before the recording cannot be awaited in it."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        for slot in self._slots:
            slot.free = torch.cuda.Event()
            slot.free.record()

    def join(self) -> None:
        """Ends the recording after the last reduction. Events of the recording cannot be awaited outside it."""
        torch.cuda.current_stream(self.device).wait_stream(self._side)
        for slot in self._slots:
            slot.free = torch.cuda.Event()

    def rewind(self) -> None:
        """Lets the next replay begin after the reductions outside the graph, such as that of the parameters outside the
        blocks.

        With two passes a step and a rank that is late:

            pass 1: graph ... | reduce "outside" through slot 0, waits on the side stream for the late rank's data
            pass 2: graph     | copies block 7's gradients into slot 0: only after the reduction above

        The graph's own events order reductions within it. An eager reduction has none of them.
        """
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def wait_for_gradients(self) -> None:
        """After it, the current stream may read the masters' gradients and change the slices: all reductions are done,
        and no copy into the ring still reads a slice."""
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        if self._offload is not None:
            self._offload.wait_for_gradients(self._add)
        if self._ring is not None:
            self._ring[0].wait_for_copies()

    def norm(self) -> Tensor:
        """The norm of the whole gradient over all ranks' slices: a float32 scalar on the device."""
        gradients = self._gradients()
        norms = [norm(g) for g in gradients] if self._offload is not None else torch._foreach_norm(gradients)
        squares = torch.stack(list(norms)).square().sum().to(self.device)
        self.exchange.all_reduce(squares)
        return squares.sqrt()

    def scale_gradients(self, factor: Tensor) -> None:
        gradients = self._gradients()
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def zero_gradients(self) -> None:
        torch._foreach_zero_(self._gradients())

    def place_moments(self, optimizer: torch.optim.Optimizer, kinds: Iterable[str]) -> None:
        """Puts the optimizer's moments where the masters are; on the device the optimizer does it itself."""
        if self._offload is None:
            return
        for name, master in self.masters.items():
            moments = {k: self._offload.allocate(f"{name}/{k}", torch.zeros_like(master)) for k in kinds}
            optimizer.state[master] = {"step": torch.tensor(0.0), **moments}

    def publish(self) -> None:
        """All-gather: the weights follow their masters, which the optimizer has changed.

        Resident units are gathered here. Of streamed blocks the slices change here, and the stream gathers them for
        each pass. The order matters:

        1. a barrier: no rank copies out of this rank's slices any more.
        2. this rank's slices are written.
        3. a barrier: every rank's slices are new.
        4. the ring fetches its blocks again.

        Without (1), rank 1, late and still fetching block 7 for its backward, could get a slice of the next step.
        """
        for name, unit in self.units.items():
            if unit.whole is not None:
                self.exchange.all_gather(unit.whole, self._cast(self.masters[name].detach()))
        if self._ring is None:
            return
        stream, store = self._ring
        stream.wait_for_copies()
        self._barrier()
        names = list(self._streamed)
        if self._offload is None:
            torch._foreach_copy_([self._streamed[n] for n in names], [self.masters[n].detach() for n in names])
        else:
            for name in names:
                self._offload.send(self.masters[name].detach(), self._streamed[name])
        store.slices_changed()
        self._barrier()
        stream.refresh()

    def _barrier(self) -> None:
        """Between the devices, in the order of the current stream and without stopping the host: an all-reduce of one
        zero. On the exchange's own connections, because the default ones may be in use by control messages."""
        self.exchange.all_reduce(torch.zeros(1, device=self.device))

    def _cast(self, master: Tensor) -> Tensor:
        """The master in the weights' dtype, on the device."""
        if self._offload is None:
            return master.to(self.dtype)
        weights = torch.empty(len(master), dtype=self.dtype, device=self.device)
        self._offload.send(master, weights)
        return weights

    def _master(self, name: str, own: Tensor) -> nn.Parameter:
        offload = self._offload
        value = own.detach().float().clone() if offload is None else offload.allocate(f"{name}/master", own)
        master = nn.Parameter(value)
        master.grad = torch.zeros_like(master)
        return master

    def _add(self, name: str, own: Tensor) -> None:
        """Accumulates a slice of the ranks' sum as their mean."""
        gradient = self.masters[name].grad
        assert gradient is not None
        if self._offload is None:
            gradient.add_(own, alpha=1 / self.exchange.world)
        else:
            accumulate(gradient, own, 1 / self.exchange.world)

    def _gradients(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def _reduced(self, number: int, flat: Tensor) -> Tensor:
        """This rank's slice of the ranks' sum, in float32, or in the gradients' dtype where the host accumulates it."""
        dtype = self.dtype if self._offload is not None else torch.float32
        own = torch.empty(len(flat) // self.exchange.world, dtype=dtype, device=self.device)
        if self._sums is None:
            self.exchange.reduce_scatter(own, flat.to(dtype))
        else:
            self._sums(number, len(flat), own)
        return own

    def _on_side_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._side) if self._cuda else nullcontext()
