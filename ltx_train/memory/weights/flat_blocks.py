"""Frozen blocks as one flat parameter each, for an engine that slices and gathers parameters by itself (DeepSpeed).

A block has some eighty tensors. Gathered one by one they cost the host more time than the block computes. As raw bytes
of one parameter they are one gather, whatever their dtypes.

    engine's hook gathers block.flat -> begin: the tensors become views of it -> the block computes -> end: they are
    empty again -> engine's hook releases block.flat
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ltx_train.memory.weights.stream import TensorPlace, layout_of
from ltx_train.model.linear import remember_norms

_FLAT = "flat_weights"


class FlatBlocks:
    """The block runner calls `begin` and `end` around a block's forward and around its backward."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._places = [_flatten(block) for block in self._blocks]

    def __contains__(self, index: int) -> bool:
        return bool(self._places[index])

    def begin(self, index: int, *, backward: bool, training: bool) -> None:
        flat: torch.Tensor = getattr(self._blocks[index], _FLAT).data
        for place in self._places[index]:
            part = flat[place.offset : place.offset + place.size]
            getattr(place.owner, place.name).data = part.view(place.dtype).view(place.shape)

    def end(self, index: int) -> None:
        # A view would keep the gathered memory alive when the engine releases it.
        for place in self._places[index]:
            tensor = getattr(place.owner, place.name)
            tensor.data = torch.empty(0, dtype=place.dtype, device=tensor.device)


def _flatten(block: nn.Module) -> list[TensorPlace]:
    places, size = layout_of(block)
    if not places:
        return []
    remember_norms(block)  # no rank has the weights afterwards
    device = getattr(places[0].owner, places[0].name).device
    flat = torch.zeros(size, dtype=torch.uint8, device=device)
    for place in places:
        tensor = getattr(place.owner, place.name)
        flat[place.offset : place.offset + place.size].copy_(tensor.detach().reshape(-1).view(torch.uint8))
        tensor.data = torch.empty(0, dtype=place.dtype, device=device)
        if place.owner._parameters.pop(place.name, None) is not None:
            # A plain attribute: the engine would slice every parameter that it can see.
            place.owner.__dict__[place.name] = tensor
    block.register_parameter(_FLAT, nn.Parameter(flat, requires_grad=False))
    return places
