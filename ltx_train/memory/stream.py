"""Weight streaming (block swap, ZeRO-3 of frozen weights): blocks travel from where they are kept into a ring of slots.

Owns when a slot is filled and when it may be overwritten; where weights are kept is the origin's. Weights
travel one way only; adapters never travel. Who runs the blocks tells it where forward and backward are: module
hooks do not fire in a checkpoint's recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltx_train.memory.origin import ALIGNMENT, Origin
from ltx_train.model.linear import remember_norms


class Place(NamedTuple):
    """One frozen tensor inside a block's flat buffer."""

    owner: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    size: int


@dataclass
class _Slot:
    """Device memory for one block; a tensor of its own, so that autograd's version counters stay apart."""

    memory: Tensor
    owner: int | None
    ready: Any
    free: Any


class WeightStream:
    """Holds the weights of `indices` (ascending) of `count` blocks; `slots` of them are on the device at a time.

    `stash` is called with each block while the model loads; afterwards `begin` and `end` around a block's
    forward and around its backward drive it.
    """

    def __init__(self, indices: Sequence[int], slots: int, device: torch.device, origin: Origin) -> None:
        self._order = sorted(indices)
        self._rank = {index: rank for rank, index in enumerate(self._order)}
        self._device, self._slot_count = device, min(slots, len(self._order))
        self._cuda = device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(device) if self._cuda else None
        self.origin = origin
        self._places: dict[int, list[Place]] = {}
        self._views: dict[int, list[Tensor]] = {}
        self._slots: list[_Slot] = []
        self._where: dict[int, int] = {}
        self._stalls: list[tuple[Any, Any]] = []
        # Of the pass that a CUDA graph repeats: its events hold the times of the last replay.
        self._repeated: list[tuple[Any, Any]] = []
        self._replays = 0

    def __contains__(self, index: int) -> bool:
        return index in self._rank

    def stash(self, index: int, block: nn.Module) -> None:
        """Gives a block's frozen tensors to the origin, as one buffer, and leaves empty ones behind."""
        remember_norms(block)
        tensors = list(_frozen(block))
        places: list[Place] = []
        offset = 0
        for owner, name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            places.append(Place(owner, name, offset, tensor.shape, tensor.dtype, size))
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        whole = self.origin.room(offset)
        for place, (_, _, tensor) in zip(places, tensors, strict=True):
            whole[place.offset : place.offset + place.size].copy_(tensor.detach().reshape(-1).view(torch.uint8))
            # The parameter itself stays: optimizers, hooks and names refer to it.
            tensor.data = torch.empty(0, dtype=place.dtype, device=self._device)
        self.origin.keep(index, whole)
        self._places[index] = places

    def places(self, index: int) -> list[Place]:
        """What lies where in a stashed block's buffer."""
        return self._places[index]

    def stash_if_streamed(self, index: int, block: nn.Module) -> None:
        """For the loader, which reports every block."""
        if index in self:
            self.stash(index, block)

    def ready(self) -> None:
        """Allocates the ring and fetches the first blocks; every streamed block must have been stashed."""
        missing = [i for i in self._order if i not in self._places]
        if missing:
            raise ValueError(f"blocks {missing} were never stashed")
        size = self.origin.largest
        for _ in range(self._slot_count):
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(memory, None, self._event(), self._event()))
        self._fill(self._window(0, backward=False, training=False))

    def begin(self, index: int, *, backward: bool, training: bool) -> None:
        """Makes the block's weights current on the compute stream and fetches ahead."""
        window = self._window(self._rank[index], backward=backward, training=training)
        self._fill(window)
        slot = self._slots[self._where[index]]
        if self._cuda:
            self._wait(slot.ready)
        for place, view in zip(self._places[index], self._viewed(index, slot), strict=True):
            # Not a copy: a compiled block takes its parameters as inputs, wherever they lie.
            getattr(place.owner, place.name).data = view

    def end(self, index: int) -> None:
        """Marks the slot free behind the block's last kernel; the next block's `begin` fetches into it."""
        if self._cuda:
            self._slots[self._where[index]].free.record()

    def stall_seconds(self) -> float:
        """How long compute waited for weights since the last call; synchronises, so for log intervals only."""
        if not self._cuda:
            return 0.0
        torch.cuda.synchronize(self._device)
        total = _elapsed(self._stalls) + (self._replays * _elapsed(self._repeated) if self._replays else 0.0)
        self._stalls.clear()
        self._replays = 0
        return total

    def settle(self) -> None:
        """What the current stream does next comes after every copy that was begun."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def refresh(self) -> None:
        """Fetches what is in the ring once more: the weights behind it have changed on the current stream."""
        if self._cuda:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        for slot in self._slots:
            if slot.owner is not None:
                self._send(slot.owner, slot)

    def rewind(self) -> None:
        """The first blocks are in the ring and usable, which every pass that a CUDA graph repeats begins with."""
        self._fill(self._window(0, backward=False, training=True))
        if self._cuda:
            for slot in self._slots:
                torch.cuda.current_stream(self._device).wait_event(slot.ready)

    def fork(self) -> None:
        """Brings the copy stream into the recording of a CUDA graph, where earlier events mean nothing."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        self._renew_events()
        self._repeated = []

    def join(self) -> None:
        """The recording ends behind all copies, with the ring as it began; the events within it end with it."""
        torch.cuda.current_stream(self._device).wait_stream(self._copies)
        for slot in self._slots:
            slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()

    def replayed(self) -> None:
        """After each replay: what comes next waits for it."""
        self._renew_events()
        self._replays += 1

    def verify(self) -> None:
        """Compares every slot with what was kept; RuntimeError when a copy is not what was sent."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        for slot in self._slots:
            if slot.owner is not None and not self.origin.matches(slot.owner, slot.memory):
                raise RuntimeError(f"the streamed weights of block {slot.owner} differ from their master")

    def _viewed(self, index: int, slot: _Slot) -> list[Tensor]:
        """A block's tensors in its slot, which is always the same one: made once, for the sake of the host's time."""
        if index not in self._views:
            self._views[index] = [
                slot.memory[p.offset : p.offset + p.size].view(p.dtype).view(p.shape) for p in self._places[index]
            ]
        return self._views[index]

    def _window(self, rank: int, *, backward: bool, training: bool) -> list[int]:
        """The blocks of the next accesses from here on, the present one first."""
        count = len(self._order)
        ahead = range(rank, -1, -1) if backward else range(rank, count)
        # Forward is followed by backward in training, by the next forward otherwise.
        turn = range(count - 1, -1, -1) if training and not backward else range(count)
        window: list[int] = []
        for place in (*ahead, *turn):
            if self._order[place] not in window:
                window.append(self._order[place])
            if len(window) == self._slot_count:
                break
        return window

    def _fill(self, window: Sequence[int]) -> None:
        for index in window[: self._slot_count]:
            # A block's slot is always the same one, so that a recorded pass can be repeated.
            number = self._rank[index] % self._slot_count
            if index not in self._where and (index == window[0] or self._slots[number].owner not in window):
                self._fetch(index, number)

    def _fetch(self, index: int, number: int) -> None:
        slot = self._slots[number]
        if slot.owner is not None:
            del self._where[slot.owner]
        self._send(index, slot)
        slot.owner = index
        self._where[index] = number

    def _send(self, index: int, slot: _Slot) -> None:
        with torch.cuda.stream(self._copies) if self._cuda else nullcontext():
            if self._cuda:
                # The host is far ahead: kernels that read what lies here may not have begun.
                self._copies.wait_event(slot.free)
            self.origin.send(index, slot.memory)
            if self._cuda:
                slot.ready.record(self._copies)

    def _wait(self, event: Any) -> None:
        recording = torch.cuda.is_current_stream_capturing()
        before, after = (torch.cuda.Event(enable_timing=True, external=recording) for _ in range(2))
        before.record()
        torch.cuda.current_stream(self._device).wait_event(event)
        after.record()
        (self._repeated if recording else self._stalls).append((before, after))

    def _renew_events(self) -> None:
        for slot in self._slots:
            slot.ready, slot.free = self._event(), self._event()

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def _elapsed(stalls: Sequence[tuple[Any, Any]]) -> float:
    return sum(before.elapsed_time(after) for before, after in stalls) / 1000


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in block.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and not tensor.requires_grad:
                yield owner, name, tensor
