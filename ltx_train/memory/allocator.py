"""How torch asks the device for memory: in segments that grow, so that many shapes leave no holes between them.

Owns that setting. Such segments cannot be mapped by other processes everywhere; memory that must be is made apart.
"""

from __future__ import annotations

import os
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager

_GROWING = "expandable_segments:True"
# torch reads the first of them that is set.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow(environment: MutableMapping[str, str]) -> None:
    """Before torch is imported, and unless the user has set something else."""
    if not _settings(environment):
        environment[_VARIABLES[-1]] = _GROWING


@contextmanager
def mappable() -> Generator[None]:
    """What is allocated within can be mapped by other processes: torch then takes none of the growing segments."""
    import torch

    settings = _settings(os.environ)
    if _GROWING not in settings or not torch.cuda.is_available():
        yield
        return
    torch._C._accelerator_setAllocatorSettings(settings.replace(_GROWING, "expandable_segments:False"))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)


def _settings(environment: MutableMapping[str, str]) -> str:
    return next((environment[name] for name in _VARIABLES if environment.get(name)), "")
