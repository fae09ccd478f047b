"""Device memory of the other processes of this machine, mapped into this process: the source of peer copies.

Owns the exchange of memory handles, flags between devices, and sums over mapped memory. Copy engines and the stream
front end do all of it. A collective's kernels would occupy streaming multiprocessors while they wait for the slowest
rank, and products that are laid out for all multiprocessors would wait for them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
# Seconds that the self-test may take.
_SELF_TEST_S = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedTensors:
    """Every rank's tensors by key and then by rank, or the reason why there are none. The same on all ranks."""

    tensors: dict[int, list[Tensor]] | None = None
    refusal: str = ""


def boot_id() -> str:
    """Identifies a running machine. Names do not: two machines may have the same, and containers of one their own."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def map_all_ranks(
    own: Mapping[int, Tensor], rank: int, device: torch.device, gather_objects: GatherObjects
) -> MappedTensors:
    """Maps the tensors of all ranks. Memory of another machine and memory that was not allocated under `mappable`
    cannot be mapped."""
    # Two rounds of messages. The first distributes the handles. Opening them can fail on a single rank, so the second
    # makes the outcome common: a rank that used mapped memory while another used collectives would wait forever.
    offers: list[tuple[str, dict[int, Any]]] = gather_objects((boot_id(), _handles(own, device)))
    mapped: dict[int, list[Tensor]] | None = None
    refusal = ""
    if any(boot != offers[0][0] for boot, _ in offers):
        refusal = "the ranks are on several machines"
    elif any(len(handles) < len(own) for _, handles in offers):
        refusal = "this torch gives no handles for the memory"
    else:
        try:
            mapped = {
                key: [own[key] if r == rank else _opened(handles[key], device) for r, (_, handles) in enumerate(offers)]
                for key in own
            }
        except (RuntimeError, AttributeError, TypeError) as error:
            refusal = f"rank {rank} cannot open another device's memory ({str(error).splitlines()[0]})"
    refusals = [text for text in gather_objects(refusal) if text]
    return MappedTensors(refusal=refusals[0]) if refusals else MappedTensors(tensors=mapped)


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

    A rank that dies leaves the others' streams waiting. The host notices: the watchdog ends the process, and reads
    from host memory which flag the stream waits for.
    """

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self._rank, self._count, self._device = rank, count, device
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        # 0, or 1 + the entry of the flag that the stream waits for. The stream writes it, the host reads it.
        self._awaited = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._driver: Any = None
        # By rank, the flags that lie on that rank's device: entry `number * world + sender`.
        self._by_receiver: list[Tensor] = []

    def map(self, world: int, gather_objects: GatherObjects) -> str:
        """Maps the flags of all ranks. Returns the reason where that is not possible; the same on every rank."""
        with mappable():
            own = torch.zeros(self._count * world, dtype=torch.int32, device=self._device)
        # The zeros must be in memory before another rank receives the handle and can set a flag.
        torch.cuda.synchronize(self._device)
        mapped = map_all_ranks({0: own}, self._rank, self._device, gather_objects)
        if mapped.tensors is not None:
            self._by_receiver = mapped.tensors[0]
        missing = _missing_driver_calls()
        if not missing:
            self._driver = ctypes.CDLL("libcuda.so.1")
        return next((reason for reason in (mapped.refusal, *gather_objects(missing)) if reason), "")

    def awaited(self) -> tuple[int, int] | None:
        """(number, sender) of the flag that this rank's stream waits for now, None for none. It asks no device."""
        entry = int(self._awaited) - 1
        return None if entry < 0 else divmod(entry, len(self._by_receiver))

    def release(self) -> None:
        """Sets all flags on this device from another stream: a stream that waits for one of them continues."""
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            self._by_receiver[self._rank].fill_(1)

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
        entry = number * len(self._by_receiver) + sender
        flag, awaited = own.data_ptr() + entry * own.element_size(), self._awaited.data_ptr()
        self._call("Write", awaited, entry + 1, 0)
        self._call("Wait", flag, 1, _WAIT_UNTIL_EQUAL)
        self._call("Write", flag, 0, 0)
        self._call("Write", awaited, 0, 0)

    def _call(self, operation: str, address: int, value: int, mode: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        call = getattr(self._driver, f"cuStream{operation}Value32_v2")
        code = call(ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(mode))
        if code:
            raise RuntimeError(f"cuStream{operation}Value32 failed with CUDA error {code}")


def _missing_driver_calls() -> str:
    """Why the driver cannot set and await flags; empty when it can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for operation in ("Write", "Wait"):
            getattr(driver, f"cuStream{operation}Value32_v2")
    except (OSError, AttributeError) as error:
        return f"the driver has no stream memory operations ({error})"
    return ""


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
    def over(
        cls, slots: list[Tensor], rank: int, world: int, gather_objects: GatherObjects
    ) -> tuple[PeerSums | None, str]:
        """The sums over all ranks' slots, after a self-test; or None with the reason, the same on all ranks."""
        device = slots[0].device
        if world == 1 or device.type != "cuda":
            return None, ""
        mapped = map_all_ranks(dict(enumerate(slots)), rank, device, gather_objects)
        if mapped.tensors is None:
            return None, mapped.refusal
        flags = Flags(2 * len(slots), rank, device)
        refusal = flags.map(world, gather_objects)
        if refusal:
            return None, refusal
        sums = cls(slots, mapped.tensors, flags, rank)
        failures = [text for text in gather_objects(sums._self_test(world)) if text]
        return (None, failures[0]) if failures else (sums, "")

    def awaited(self) -> str:
        """The flag that this rank's device waits for, in words; empty for none."""
        awaited = self._flags.awaited()
        if awaited is None:
            return ""
        number, sender = awaited
        kind = "gradients of" if number < len(self._slots) else "confirmation that gradients were read by"
        return f"its device waits for the {kind} rank {sender}"

    def _self_test(self, world: int) -> str:
        """Sums a known pattern through every slot. Returns what failed, empty for nothing.

        The interfaces below are private to torch and the driver. A flag that never arrives would stop the device for
        good, so the host waits for it and sets it itself when the time is over.
        """
        size, expected = world * 64, world * (world + 1) / 2
        total = torch.empty(64, dtype=torch.float32, device=self._slots[0].device)
        for number, slot in enumerate(self._slots):
            slot[:size] = self._rank + 1
            self(number, size, total)
            done = torch.cuda.Event()
            done.record()
            deadline = time.monotonic() + _SELF_TEST_S
            while not done.query():
                if time.monotonic() > deadline:
                    self._flags.release()
                    done.synchronize()
                    return f"flags between the devices did not arrive within {_SELF_TEST_S:.0f} s"
                time.sleep(1e-4)
            slot[:size] = 0
            if not bool((total == expected).all()):
                return "sums over the devices' memory came out wrong"
        return ""

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
