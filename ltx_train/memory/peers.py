"""Memory of other processes' devices on this machine, mapped into this one's: what copy engines read from.

Owns the exchange of handles, flags between devices, and sums over them. None of it takes a processor that
computes: a collective's kernels do, and the products beside them, which count on all processors, wait for those.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ltx_train.memory.allocator import mappable

Tell = Callable[[Any], list[Any]]
# Where torch's handle names the device that maps the memory.
_DEVICE = 6
# The driver's CU_STREAM_WAIT_VALUE_EQ.
_EQUAL = 1


def reached(mine: Mapping[int, Tensor], rank: int, device: torch.device, tell: Tell) -> dict[int, list[Tensor]] | None:
    """Every rank's tensors by key and rank; None, on all ranks, where one cannot reach another's.

    tell(value) gives every rank's value. Memory of another machine cannot be mapped, nor what is not `mappable`.
    """
    handles: dict[int, Any] = {}
    if device.type == "cuda":
        try:
            handles = {key: reduce_tensor(tensor)[1] for key, tensor in mine.items()}
        # Memory of segments that grow has no handle; all ranks must still be told.
        except RuntimeError:
            handles = {}
    offers = tell((socket.gethostname(), handles))
    found: dict[int, list[Tensor]] | None = None
    if all(host == offers[0][0] and len(given) == len(mine) for host, given in offers):
        try:
            found = {
                key: [own if r == rank else _mapped(given[key], device) for r, (_, given) in enumerate(offers)]
                for key, own in mine.items()
            }
        except RuntimeError:
            found = None
    return found if all(tell(found is not None)) else None


class Flags:
    """`count` flags from every rank to every other, in device memory, in the order of streams; a CUDA graph can hold
    their use. A raised flag must be awaited before it is raised again."""

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self._rank, self._count, self._device = rank, count, device
        self._raised = torch.ones(1, dtype=torch.int32, device=device)
        self._driver: Any = ctypes.CDLL("libcuda.so.1")
        self._theirs: list[Tensor] = []

    def begin(self, world: int, tell: Tell) -> bool:
        """Whether every rank's flags can be reached."""
        with mappable():
            mine = torch.zeros(self._count * world, dtype=torch.int32, device=self._device)
        # Zeroed before another rank can raise one.
        torch.cuda.synchronize(self._device)
        found = reached({0: mine}, self._rank, self._device, tell)
        self._theirs = [] if found is None else found[0]
        return found is not None

    def hoist(self, number: int, rank: int) -> None:
        """Raises a flag on another rank's device, behind what the current stream does."""
        place = number * len(self._theirs) + self._rank
        # A copy: unlike a kernel it needs no processor, and a graph can hold it.
        self._theirs[rank][place : place + 1].copy_(self._raised, non_blocking=True)

    def wait(self, number: int, rank: int) -> None:
        """What the current stream does next comes after the flag that another rank raises here; lowers it."""
        mine = self._theirs[self._rank]
        place = mine.data_ptr() + (number * len(self._theirs) + rank) * mine.element_size()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for operation, value, how in (("Wait", 1, _EQUAL), ("Write", 0, 0)):
            call = getattr(self._driver, f"cuStream{operation}Value32_v2")
            code = call(ctypes.c_void_p(stream), ctypes.c_uint64(place), ctypes.c_uint32(value), ctypes.c_uint(how))
            if code:
                raise RuntimeError(f"cuStream{operation}Value32 failed with CUDA error {code}")


class PeerSums:
    """Sums over the ranks of a part of memory that each of them has: `sums(slot, size, share)` fills `share` with the
    sum of this rank's part of the first `size` elements of all ranks' slots.

    Every rank must call it alike; when the current stream has done it, the slot may be written again.
    """

    def __init__(self, slots: list[Tensor], theirs: dict[int, list[Tensor]], flags: Flags, rank: int) -> None:
        self._slots, self._theirs, self._flags, self._rank = slots, theirs, flags, rank
        self._together = torch.empty_like(slots[0])

    @classmethod
    def over(cls, slots: list[Tensor], rank: int, world: int, tell: Tell) -> PeerSums | None:
        """None, on all ranks, where one cannot reach another's memory."""
        device = slots[0].device
        if world == 1 or device.type != "cuda":
            return None
        theirs = reached(dict(enumerate(slots)), rank, device, tell)
        flags = Flags(2 * len(slots), rank, device)
        return cls(slots, theirs, flags, rank) if theirs is not None and flags.begin(world, tell) else None

    def __call__(self, slot: int, size: int, share: Tensor) -> None:
        world = len(self._theirs[slot])
        others = [(self._rank + turn) % world for turn in range(1, world)]
        # One says that a slot may be read, the other that nobody reads it any more.
        filled, taken = slot, len(self._slots) + slot
        parts = self._together[:size].chunk(world)
        for other in others:
            self._flags.hoist(filled, other)
        parts[self._rank].copy_(self._slots[slot][:size].chunk(world)[self._rank], non_blocking=True)
        for other in others:
            self._flags.wait(filled, other)
            parts[other].copy_(self._theirs[slot][other][:size].chunk(world)[self._rank], non_blocking=True)
            self._flags.hoist(taken, other)
        torch.sum(self._together[:size].view(world, -1), 0, dtype=share.dtype, out=share)
        for other in others:
            self._flags.wait(taken, other)


def _mapped(handle: tuple[Any, ...], device: torch.device) -> Tensor:
    """Into the address space of this rank's device, which needs no context on the other one."""
    rebuild: Any = torch.multiprocessing.reductions.rebuild_cuda_tensor
    changed = (*handle[:_DEVICE], device.index, *handle[_DEVICE + 1 :])
    return rebuild(*changed)
