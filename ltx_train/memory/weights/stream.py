"""Weight streaming (block swap, and ZeRO-3's all-gather): blocks are copied from their store into a ring of slots.

Owns when a slot is filled and when it may be overwritten; the store knows where weights are kept. Weights travel one
way only, adapters never. The block runner calls `begin` and `end` around forward and around backward, because module
hooks do not fire in the recomputation of a checkpoint.

The ring with 4 streamed blocks and 3 slots. Slot = position of the block modulo the number of slots:

    slot 0: block 0 ........ block 3        forward:  0 1 2 3
    slot 1: block 1 ........                backward: 3 2 1 0
    slot 2: block 2 ........

At `begin(1)` in forward the window is [1, 2, 3]: the present block, then the next accesses in order, one per slot.
Block 3 belongs into slot 0, whose owner, block 0, is not in the window: it is fetched while block 1 computes. At
`begin(2)` the window is [2, 3, 1] and at `begin(3)` [3, 2, 1]: everything is in the ring. At `begin(2)` in backward
it is [2, 1, 0]; block 0 belongs into slot 0, whose owner 3 is done: it is fetched while block 2 computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltx_train.memory.weights.stores import ALIGNMENT, WeightStore
from ltx_train.model.linear import remember_norms

# Timed waits that are kept as pairs of events.
_MOST_STALLS = 1024


class TensorPlace(NamedTuple):
    """One frozen tensor inside its block's flat buffer; offset and size count bytes."""

    owner: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    size: int


@dataclass
class _Slot:
    """Device memory for one block. A tensor of its own, so that autograd's version counters stay separate.

    owner: the block whose weights are in it or on their way. ready: recorded on the copy stream behind the copy.
    free: recorded on the compute stream behind the last kernel that reads the slot.
    """

    memory: Tensor
    owner: int | None
    ready: Any
    free: Any


class WeightStream:
    """Streams the weights of the blocks `indices`; `slots` of them are on the device at a time.

    `stash` is called with each block while the model loads. Afterwards `begin` and `end` drive the ring.
    """

    def __init__(self, indices: Sequence[int], slots: int, device: torch.device, store: WeightStore) -> None:
        self._order = sorted(indices)
        self._position = {index: position for position, index in enumerate(self._order)}
        self._device, self._slot_count = device, min(slots, len(self._order))
        self._cuda = device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(device) if self._cuda else None
        self.store = store
        self._places: dict[int, list[TensorPlace]] = {}
        self._views: dict[int, list[Tensor]] = {}
        self._slots: list[_Slot] = []
        self._stalls: deque[tuple[Any, Any]] = deque()
        # Of the pairs that were dropped from `_stalls`.
        self._earlier_stalls_s = 0.0
        # Of the pass that a CUDA graph repeats: these events hold the times of the last replay.
        self._recorded_stalls: list[tuple[Any, Any]] = []
        self._replays = 0

    def __contains__(self, index: int) -> bool:
        return index in self._position

    def stash(self, index: int, block: nn.Module) -> None:
        """Moves a block's frozen tensors to the store, as one buffer, and leaves empty tensors behind."""
        remember_norms(block)
        places, size = layout_of(block)
        buffer = self.store.allocate(size)
        for place in places:
            tensor = getattr(place.owner, place.name)
            buffer[place.offset : place.offset + place.size].copy_(tensor.detach().reshape(-1).view(torch.uint8))
            # The parameter object stays: optimizers, hooks and names refer to it.
            tensor.data = torch.empty(0, dtype=place.dtype, device=self._device)
        self.store.put(index, buffer)
        self._places[index] = places

    def places(self, index: int) -> list[TensorPlace]:
        """The layout of a stashed block's buffer."""
        return self._places[index]

    def stash_if_streamed(self, index: int, block: nn.Module) -> None:
        """The loader calls it with every block."""
        if index in self:
            self.stash(index, block)

    def allocate_ring(self) -> None:
        """Allocates the slots and fetches the first blocks; every streamed block must have been stashed."""
        missing = [i for i in self._order if i not in self._places]
        if missing:
            raise ValueError(f"blocks {missing} were never stashed")
        size = self.store.largest
        for _ in range(self._slot_count):
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(memory, None, self._event(), self._event()))
        self._fill(self._window(0, backward=False, training=False))

    def begin(self, index: int, *, backward: bool, training: bool) -> None:
        """Makes a block's weights usable on the compute stream and prefetches the next blocks."""
        self._fill(self._window(self._position[index], backward=backward, training=training))
        slot = self._slot_of(index)
        if self._cuda:
            self._wait(slot.ready)
        for place, view in zip(self._places[index], self._slot_views(index, slot), strict=True):
            # No copy: a compiled block takes its parameters as inputs, at any address.
            getattr(place.owner, place.name).data = view

    def end(self, index: int) -> None:
        """Marks the slot free behind the block's last kernel; the next `begin` may fetch into it."""
        if self._cuda:
            self._slot_of(index).free.record()

    def stall_seconds(self) -> float:
        """How long computation waited for weights since the last call. It synchronises: for log intervals only."""
        if not self._cuda:
            return 0.0
        torch.cuda.synchronize(self._device)
        total = self._earlier_stalls_s + _elapsed(self._stalls)
        if self._replays:
            total += self._replays * _elapsed(self._recorded_stalls)
        self._stalls.clear()
        self._replays, self._earlier_stalls_s = 0, 0.0
        return total

    def wait_for_copies(self) -> None:
        """The current stream continues after every copy that was begun: nothing reads the store's slices then."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def refresh(self) -> None:
        """Fetches the blocks in the ring once more: the current stream has changed their weights in the store."""
        if self._cuda:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        for slot in self._slots:
            if slot.owner is not None:
                self._copy(slot.owner, slot)

    def rewind(self) -> None:
        """Puts the first blocks into the ring, ready for use: the state in which every recorded pass begins."""
        self._fill(self._window(0, backward=False, training=True))
        if self._cuda:
            for slot in self._slots:
                torch.cuda.current_stream(self._device).wait_event(slot.ready)

    def fork(self) -> None:
        """Begins the copy stream's part of a CUDA graph. Events from before the recording cannot be awaited in it."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        self._renew_events()
        self._recorded_stalls = []

    def join(self) -> None:
        """Ends the recording after all copies, with the ring as it began. Its events cannot be awaited outside it."""
        torch.cuda.current_stream(self._device).wait_stream(self._copies)
        for slot in self._slots:
            slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()

    def replayed(self) -> None:
        """Called after each replay: copies that follow must wait for it."""
        self._renew_events()
        self._replays += 1

    def verify(self) -> None:
        """Compares every slot with the store; RuntimeError when a copy differs."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        for slot in self._slots:
            if slot.owner is not None and not self.store.matches(slot.owner, slot.memory):
                raise RuntimeError(f"the streamed weights of block {slot.owner} differ from their master")

    def _slot_of(self, index: int) -> _Slot:
        return self._slots[self._position[index] % self._slot_count]

    def _slot_views(self, index: int, slot: _Slot) -> list[Tensor]:
        """A block's tensors in its slot. Made once, because making views costs the host time in every step."""
        if index not in self._views:
            self._views[index] = [
                slot.memory[p.offset : p.offset + p.size].view(p.dtype).view(p.shape) for p in self._places[index]
            ]
        return self._views[index]

    def _window(self, position: int, *, backward: bool, training: bool) -> list[int]:
        """The blocks of the next accesses, the one at `position` first, at most one per slot.

        Derived from the present block and the direction and not from a recorded sequence: a validation pass between
        two steps cannot derail it.
        """
        count = len(self._order)
        ahead = range(position, -1, -1) if backward else range(position, count)
        # Forward is followed by backward in training, otherwise by the next forward.
        turn = range(count - 1, -1, -1) if training and not backward else range(count)
        window: list[int] = []
        for following in (*ahead, *turn):
            if self._order[following] not in window:
                window.append(self._order[following])
            if len(window) == self._slot_count:
                break
        return window

    def _fill(self, window: Sequence[int]) -> None:
        """Fetches what of the window is missing in the ring.

        Invariant: a block is only ever in the slot `position % slots`, so that a CUDA graph can replay the pass with
        fixed addresses. A block of the window therefore stays unfetched while another block of the window owns its
        slot: that one is used earlier, and a later `begin` fetches this one. The present block is always fetched.
        """
        for index in window:
            slot = self._slot_of(index)
            if slot.owner != index and (index == window[0] or slot.owner not in window):
                slot.owner = index
                self._copy(index, slot)

    def _copy(self, index: int, slot: _Slot) -> None:
        with torch.cuda.stream(self._copies) if self._cuda else nullcontext():
            if self._cuda:
                # The host runs ahead: kernels that read the slot's previous block may not have started yet.
                self._copies.wait_event(slot.free)
            self.store.copy_to(index, slot.memory)
            if self._cuda:
                slot.ready.record(self._copies)

    def _wait(self, event: Any) -> None:
        """Waits for an event on the compute stream, between two timed events."""
        recording = torch.cuda.is_current_stream_capturing()
        before, after = (torch.cuda.Event(enable_timing=True, external=recording) for _ in range(2))
        before.record()
        torch.cuda.current_stream(self._device).wait_event(event)
        after.record()
        (self._recorded_stalls if recording else self._stalls).append((before, after))
        # Two events a block and pass: without a bound they would grow for as long as `logger.every` steps.
        while len(self._stalls) > _MOST_STALLS and self._stalls[0][1].query():
            self._earlier_stalls_s += _elapsed([self._stalls.popleft()])

    def _renew_events(self) -> None:
        for slot in self._slots:
            slot.ready, slot.free = self._event(), self._event()

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def layout_of(block: nn.Module) -> tuple[list[TensorPlace], int]:
    """Where a block's frozen tensors lie in one flat buffer, and the buffer's size in bytes."""
    places: list[TensorPlace] = []
    offset = 0
    for owner, name, tensor in _frozen_tensors(block):
        size = tensor.numel() * tensor.element_size()
        places.append(
            TensorPlace(owner=owner, name=name, offset=offset, shape=tensor.shape, dtype=tensor.dtype, size=size)
        )
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return places, offset


def _elapsed(pairs: Iterable[tuple[Any, Any]]) -> float:
    return sum(before.elapsed_time(after) for before, after in pairs) / 1000


def _frozen_tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in block.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and not tensor.requires_grad:
                yield owner, name, tensor
