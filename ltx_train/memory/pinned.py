"""Page-locked host memory of exactly the size asked for."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


def pinned(size: int, device: torch.device) -> Tensor:
    """`size` bytes that `device` can read without a staging copy; plain memory when it is the CPU.

    Locked for as long as the tensor itself lives; views of it do not count. torch's own pinned allocator rounds up to
    a power of two. MemoryError when locking is refused.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type != "cuda" or size == 0:
        return memory
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(memory.data_ptr(), size, 0)
    if int(code) != 0:
        raise MemoryError(f"{size / 2**30:.1f} GiB of host memory could not be page-locked: raise `ulimit -l`")
    # Addresses that are freed while locked cannot be locked again when they come back.
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory
