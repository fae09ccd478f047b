"""Memory of other processes' devices on this machine, mapped into this one's: what copy engines read from.

Owns the exchange of handles. Who may read or write when is its user's.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

Tell = Callable[[Any], list[Any]]
# Where torch's handle names the device that maps the memory.
_DEVICE = 6


def reached(mine: Mapping[int, Tensor], rank: int, device: torch.device, tell: Tell) -> dict[int, list[Tensor]] | None:
    """Every rank's tensors by key and rank; None, on all ranks, where one cannot reach another's.

    tell(value) gives every rank's value. Memory of another machine cannot be mapped, nor can expandable segments.
    """
    handles: dict[int, Any] = {}
    if device.type == "cuda":
        try:
            handles = {key: reduce_tensor(tensor)[1] for key, tensor in mine.items()}
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


def _mapped(handle: tuple[Any, ...], device: torch.device) -> Tensor:
    """Into the address space of this rank's device, which needs no context on the other one."""
    rebuild: Any = torch.multiprocessing.reductions.rebuild_cuda_tensor
    changed = (*handle[:_DEVICE], device.index, *handle[_DEVICE + 1 :])
    return rebuild(*changed)
