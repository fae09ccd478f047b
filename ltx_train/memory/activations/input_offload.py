"""Offloads the inputs of recomputed blocks to pinned host memory between forward and backward.

Owns the copies, and the storage of the offloaded tensors. The storage is emptied in place, so that a tensor saved for
backward has its content again after `fetch`. Streamed weights use the other direction of the link, host to device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltx_train.memory.pinned import pinned


@dataclass(kw_only=True)
class _Away:
    """A block's inputs while they are copied to the host, offloaded, or copied back."""

    tensors: list[Tensor]
    sizes: list[int]
    copied: Any
    emptied: bool = False
    returning: bool = False


class InputOffload:
    """Call `send` after a block's forward and `fetch` before its backward, in the reverse order."""

    def __init__(self, indices: Sequence[int], device: torch.device) -> None:
        self._indices, self._device = frozenset(indices), device
        self._cuda = device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(device) if self._cuda else None
        self._hosts: dict[int, Tensor] = {}
        self._away: dict[int, _Away] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._indices

    def send(self, index: int, hidden: Sequence[Tensor]) -> None:
        """Copies the tensors of a block to the host, and empties the storage of the block sent before."""
        # Emptied one block later: emptying waits for the copy, and this block's forward has hidden the copy.
        for sent in list(self._away):
            self._empty(sent)
        tensors = [h.detach() for h in hidden]
        sizes = [t.untyped_storage().nbytes() for t in tensors]
        host = self._host(index, sum(sizes))
        with self._copying():
            for piece, tensor in zip(host.split(sizes), tensors, strict=True):
                piece.copy_(_bytes(tensor), non_blocking=self._cuda)
        self._away[index] = _Away(tensors=tensors, sizes=sizes, copied=self._recorded())
        if not self._cuda:
            self._empty(index)

    def fetch(self, index: int) -> None:
        """Restores the block's inputs and starts to copy those of the block that comes next in backward."""
        self._return(index)
        away = self._away.pop(index)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(away.copied)
        following = max(self._away, default=None)
        if following is not None:
            self._return(following)

    def fork(self) -> None:
        """Adds the copy stream to the capture of a CUDA graph."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """Makes the capture wait for all copies before it ends."""
        torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def rewind(self) -> None:
        """Does nothing: every copy of a pass is awaited within its backward."""

    def _empty(self, index: int) -> None:
        away = self._away[index]
        if away.emptied:
            return
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(away.copied)
        for tensor in away.tensors:
            tensor.untyped_storage().resize_(0)
        away.emptied = True

    def _return(self, index: int) -> None:
        away = self._away[index]
        if away.returning:
            return
        away.returning = True
        # Backward needs the last block's inputs before their storage is emptied.
        if not away.emptied:
            return
        for tensor, size in zip(away.tensors, away.sizes, strict=True):
            tensor.untyped_storage().resize_(size)
        with self._copying():
            host = self._hosts[index][: sum(away.sizes)]
            for piece, tensor in zip(host.split(away.sizes), away.tensors, strict=True):
                _bytes(tensor).copy_(piece, non_blocking=self._cuda)
        away.copied = self._recorded()

    def _host(self, index: int, size: int) -> Tensor:
        """The block's host buffer, enlarged when a bucket needs more."""
        buffer = self._hosts.get(index)
        if buffer is None or buffer.numel() < size:
            self._hosts[index] = pinned(size, self._device)
        return self._hosts[index][:size]

    def _copying(self) -> Any:
        """A context with the copy stream, which first waits for all work queued on the compute stream."""
        if not self._cuda:
            return nullcontext()
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._copies)

    def _recorded(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record(self._copies)
        return event


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's complete storage as bytes, whichever view of it the tensor is."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
