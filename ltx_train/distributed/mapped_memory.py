"""Device memory of the other processes of this machine, mapped into this process: the source of peer copies.

Owns the exchange of memory handles, flags between devices, and sums over mapped memory. Copy engines and the stream
front end do all of it. A collective's kernels would occupy streaming multiprocessors while they wait for the slowest
rank, and products that are laid out for all multiprocessors would wait for them.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ltx_train.distributed.allocator import mappable
from ltx_train.distributed.exchange import GatherObjects

# torch's CUDA handle is a private tuple of 15 entries; entry 6 is the device that opens the memory. The layout is that
# of torch 2.11 and 2.13, the releases that this was run with.
_HANDLE_ENTRIES, _HANDLE_DEVICE = 15, 6
# The driver's CU_STREAM_WAIT_VALUE_EQ.
_WAIT_UNTIL_EQUAL = 1


def map_all_ranks(
    own: Mapping[int, Tensor], rank: int, device: torch.device, gather_objects: GatherObjects
) -> dict[int, list[Tensor]] | None:
    """Every rank's tensors by key and then by rank; None, on all ranks, where one rank cannot map another's.

    Memory of another machine and memory that was not allocated under `mappable` cannot be mapped.
    """
    # Two rounds of messages. The first distributes the handles. Opening them can fail on a single rank, so the second
    # makes the outcome common: a rank that used mapped memory while another used collectives would wait forever.
    offers = gather_objects((socket.gethostname(), _handles(own, device)))
    mapped: dict[int, list[Tensor]] | None = None
    if all(host == offers[0][0] and len(handles) == len(own) for host, handles in offers):
        try:
            mapped = {
                key: [own[key] if r == rank else _opened(handles[key], device) for r, (_, handles) in enumerate(offers)]
                for key in own
            }
        except RuntimeError:
            mapped = None
    return mapped if all(gather_objects(mapped is not None)) else None


def _handles(tensors: Mapping[int, Tensor], device: torch.device) -> dict[int, Any]:
    """Handles by key; empty where the memory has none, which is the case for expandable segments."""
    if device.type != "cuda":
        return {}
    try:
        handles = {key: reduce_tensor(tensor)[1] for key, tensor in tensors.items()}
    except RuntimeError:
        return {}
    # Another layout of torch's private tuple: collectives are used instead.
    return handles if all(len(handle) == _HANDLE_ENTRIES for handle in handles.values()) else {}


class Flags:
    """`count` flags from every rank to every other rank, in device memory, set and awaited in stream order.

    A flag is 0 or 1. The sender copies a 1 into the receiver's memory; the receiver's stream waits until the value is 1
    and then writes 0. A sender sets a flag again only after a flag in the opposite direction has shown that the
    receiver has cleared it (`PeerSums` alternates the two). Two values suffice for that, and unlike a growing counter
    they are the same in every replay of a CUDA graph.

    A rank that dies leaves the others' streams waiting. The host notices: the watchdog ends the process.
    """

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self._rank, self._count, self._device = rank, count, device
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self._driver: Any = ctypes.CDLL("libcuda.so.1")
        # By rank, the flags that lie on that rank's device: entry `number * world + sender`.
        self._by_receiver: list[Tensor] = []

    def map(self, world: int, gather_objects: GatherObjects) -> bool:
        """Whether the flags of all ranks are mapped; the same answer on every rank."""
        with mappable():
            own = torch.zeros(self._count * world, dtype=torch.int32, device=self._device)
        # The zeros must be in memory before another rank receives the handle and can set a flag.
        torch.cuda.synchronize(self._device)
        mapped = map_all_ranks({0: own}, self._rank, self._device, gather_objects)
        self._by_receiver = [] if mapped is None else mapped[0]
        return mapped is not None

    def set(self, number: int, receiver: int) -> None:
        """Sets a flag on another rank's device after everything that the current stream has been given.

        The flag is a copy between devices like the data before it. Operations of one stream complete in order, and a
        copy has completed when its bytes are visible in the receiver's memory: who sees the flag sees the data.
        """
        entry = number * len(self._by_receiver) + self._rank
        # A copy engine does it: no multiprocessor is needed, and a CUDA graph can record it.
        self._by_receiver[receiver][entry : entry + 1].copy_(self._one, non_blocking=True)

    def wait(self, number: int, sender: int) -> None:
        """The current stream continues when `sender` has set its flag here; the flag is cleared."""
        own = self._by_receiver[self._rank]
        address = own.data_ptr() + (number * len(self._by_receiver) + sender) * own.element_size()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for operation, value, mode in (("Wait", 1, _WAIT_UNTIL_EQUAL), ("Write", 0, 0)):
            call = getattr(self._driver, f"cuStream{operation}Value32_v2")
            code = call(ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(mode))
            if code:
                raise RuntimeError(f"cuStream{operation}Value32 failed with CUDA error {code}")


class PeerSums:
    """A reduce-scatter over mapped memory: `sums(slot, size, total)` fills `total` (size / world,) with the sum over
    the ranks of this rank's part of the first `size` elements of a slot.

    Every rank calls it with the same slots in the same order. When the current stream has completed the call, no rank
    reads the slot any more. The mapped tensors must outlive every call on every rank.
    """

    def __init__(self, slots: list[Tensor], mapped: dict[int, list[Tensor]], flags: Flags, rank: int) -> None:
        self._slots, self._mapped, self._flags, self._rank = slots, mapped, flags, rank
        # Used by every call. Calls follow each other on one stream, and a replay of a CUDA graph waits for that stream
        # (`SideStream.rewind`), so a call's copies begin after the sum before.
        self._gathered = torch.empty_like(slots[0])

    @classmethod
    def over(cls, slots: list[Tensor], rank: int, world: int, gather_objects: GatherObjects) -> PeerSums | None:
        """None, on all ranks, where one rank cannot map another's memory."""
        device = slots[0].device
        if world == 1 or device.type != "cuda":
            return None
        mapped = map_all_ranks(dict(enumerate(slots)), rank, device, gather_objects)
        flags = Flags(2 * len(slots), rank, device)
        return cls(slots, mapped, flags, rank) if mapped is not None and flags.map(world, gather_objects) else None

    def __call__(self, slot: int, size: int, total: Tensor) -> None:
        """The protocol, in the order of one stream:

        1. set `filled` on every other rank: this rank's slot may be read.
        2. for each other rank: wait for its `filled`, copy this rank's part of its slot, set its `taken`.
        3. add the copied parts in float32.
        4. wait for `taken` from every other rank: this rank's slot may be overwritten.

        It cannot deadlock: step 1 waits for nothing, so every rank reaches step 2, and every wait in 2 and 4 is for a
        flag that another rank sets before it waits for this rank's next step. Each slot has flags of its own, so two
        calls for two slots never share one.
        """
        world = len(self._mapped[slot])
        others = [(self._rank + turn) % world for turn in range(1, world)]
        filled, taken = slot, len(self._slots) + slot
        parts = self._gathered[:size].chunk(world)
        for other in others:
            self._flags.set(filled, other)
        parts[self._rank].copy_(self._slots[slot][:size].chunk(world)[self._rank], non_blocking=True)
        for other in others:
            self._flags.wait(filled, other)
            parts[other].copy_(self._mapped[slot][other][:size].chunk(world)[self._rank], non_blocking=True)
            self._flags.set(taken, other)
        torch.sum(self._gathered[:size].view(world, -1), 0, dtype=total.dtype, out=total)
        for other in others:
            self._flags.wait(taken, other)


def _opened(handle: tuple[Any, ...], device: torch.device) -> Tensor:
    """Maps memory into the address space of this rank's device, which needs no context on the other device."""
    rebuild: Any = torch.multiprocessing.reductions.rebuild_cuda_tensor
    return rebuild(*handle[:_HANDLE_DEVICE], device.index, *handle[_HANDLE_DEVICE + 1 :])
