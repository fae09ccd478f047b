"""Host memory, or a fast disk, for what the optimizer keeps of shared weights.

Owns where these tensors lie and how gradients get there; the arithmetic is their user's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.memory.pinned import pinned

Add = Callable[[str, Tensor], None]


class Host:
    """folder: where files stand for the memory, one folder for each rank; None for memory itself."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._staged: dict[str, tuple[Tensor, Any]] = {}
        self._waiting: list[str] = []

    def room(self, name: str, like: Tensor) -> Tensor:
        """float32 with the values of `like`; DataError when the disk has no room for it."""
        if self._folder is None:
            return like.detach().to("cpu", torch.float32, copy=True)
        file = self._folder / f"{name.replace('/', '.')}.f32"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as opened:  # a disk that is full later on would end the process without a word
                os.posix_fallocate(opened.fileno(), 0, 4 * like.numel())
        except OSError as error:
            raise DataError(f"strategy.offload: {file} cannot be made ({error})") from error
        mapped = torch.from_file(str(file), shared=True, size=like.numel(), dtype=torch.float32)
        return mapped.copy_(like.detach())

    def take(self, name: str, share: Tensor, add: Add) -> None:
        """Begins to copy a share of a gradient here; what of the same came before is added first."""
        if name in self._waiting:
            self._finish(name, add)
        if name not in self._staged:
            memory = pinned(share.numel() * share.element_size(), share.device).view(share.dtype)
            self._staged[name] = memory, torch.cuda.Event() if share.is_cuda else None
        memory, arrived = self._staged[name]
        memory.copy_(share, non_blocking=True)
        if arrived is not None:
            arrived.record()
        self._waiting.append(name)

    def settle(self, add: Add) -> None:
        """Adds all that is under way."""
        for name in list(self._waiting):
            self._finish(name, add)

    def _finish(self, name: str, add: Add) -> None:
        memory, arrived = self._staged[name]
        if arrived is not None:
            arrived.synchronize()
        add(name, memory)
        self._waiting.remove(name)
