"""torch's GPU allocator: its limit, and expandable segments, which leave no holes between buckets of many shapes.

Owns these settings. Other processes cannot map expandable segments everywhere; memory for them is allocated apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, MutableMapping
from contextlib import contextmanager

_EXPANDABLE = "expandable_segments:True"
# torch reads the first of them that is set.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Call it before torch is imported. A user's own allocator settings are kept."""
    if not _settings(environment):
        environment[_VARIABLES[-1]] = _EXPANDABLE


@contextmanager
def mappable() -> Generator[None]:
    """Memory that is allocated within the context can be mapped by other processes: no expandable segments there.

    A torch without this private setting allocates as always: the memory cannot be mapped then, and collectives take
    the place of copies.
    """
    import torch

    settings = _settings(os.environ)
    change: Callable[[str], None] | None = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if _EXPANDABLE not in settings or not torch.cuda.is_available() or change is None:
        yield
        return
    change(settings.replace(_EXPANDABLE, "expandable_segments:False"))
    try:
        yield
    finally:
        change(settings)


def cap(device_index: int, gib: float) -> None:
    """Makes this process fail when it reserves more of a GPU, as it would on a smaller one."""
    import torch

    total = torch.cuda.get_device_properties(device_index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device_index)


def room_gib(device_index: int, budget_gib: float | None) -> float:
    """What this process may still allocate: of the budget, or of what is free on the device without one.

    Memory that torch holds without using it is given back first, so that pools of CUDA graphs count as used.
    """
    import torch

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device_index)
    if budget_gib is None:
        return free / 2**30
    return min(free / 2**30, budget_gib - torch.cuda.memory_reserved(device_index) / 2**30)


def _settings(environment: MutableMapping[str, str]) -> str:
    return next((environment[name] for name in _VARIABLES if environment.get(name)), "")
