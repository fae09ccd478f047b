"""Pinned (page-locked) host memory of an exact size."""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


def pinned(size: int, device: torch.device) -> Tensor:
    """Allocates `size` bytes that `device` can read without a staging copy; plain memory when the device is the CPU.

    The memory stays locked as long as the returned tensor lives; views do not keep it locked. torch's own pinned
    allocator would round the size up to a power of two. Raises MemoryError when locking fails.
    """
    if device.type != "cuda" or size == 0:
        return torch.empty(size, dtype=torch.uint8)
    memory = outside_forks(size)
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(memory.data_ptr(), size, 0)
    if int(code) != 0:
        raise MemoryError(f"{size / 2**30:.1f} GiB of host memory could not be page-locked: raise `ulimit -l`")
    # Memory freed while locked cannot be locked again when the allocator reuses its addresses.
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


def outside_forks(size: int) -> Tensor:
    """`size` bytes that a forked process does not get.

    Linux gives a forked process its own copy of page-locked memory at once, instead of when one of the two writes: each
    process that reads samples would take another 16 GiB for the streamed weights of an int8 22B. It has no use for
    them. Reading them there would be a segmentation fault.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)
