"""Blocks as flat parameters, for an engine that slices, gathers and reduces parameters by itself (DeepSpeed's ZeRO-3).

A block has some eighty tensors. Gathered and reduced one by one they cost the host more time than the block computes.
Here a block has one parameter, and its tensors are views of it while the block computes.

    engine gathers it -> begin: the tensors become views -> the block computes -> end: they are empty again
    -> engine releases it

In backward the gradients of the tensors accumulate as usual. Behind the last of them, `attach` hands them to the
engine as one gradient of the flat parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FLAT = "flat"


class ParameterPlace(NamedTuple):
    """A trained parameter inside a flat tensor; start and stop count elements."""

    name: str
    parameter: nn.Parameter
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


class FlatBlocks:
    """The block runner calls `begin` and `end` around a block's forward and around its backward."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._places = [_flatten(block, f"transformer_blocks.{index}") for index, block in enumerate(self._blocks)]

    def __contains__(self, index: int) -> bool:
        return True

    def contents(self) -> dict[nn.Parameter, Sequence[ParameterPlace]]:
        """What lies in each flat parameter."""
        return {getattr(block, _FLAT): places for block, places in zip(self._blocks, self._places, strict=True)}

    def begin(self, index: int, *, backward: bool, training: bool) -> None:
        whole: Tensor = getattr(self._blocks[index], _FLAT).data
        for place in self._places[index]:
            place.parameter.data = whole[place.start : place.stop].view(place.shape)

    def end(self, index: int) -> None:
        # A view would keep the gathered memory alive when the engine releases it.
        for place in self._places[index]:
            place.parameter.data = torch.empty(0, dtype=place.parameter.dtype, device=place.parameter.device)

    def bind(self) -> None:
        """Makes the tensors of all blocks views of their flat parameters, which the engine has gathered."""
        for index in range(len(self._blocks)):
            self.begin(index, backward=False, training=False)

    def release(self) -> None:
        for index in range(len(self._blocks)):
            self.end(index)

    def attach(self, index: int, hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The block's input, unchanged. In backward, which comes here last of all, the block's gradients become the
        flat parameter's."""
        flat = getattr(self._blocks[index], _FLAT)
        return _Attach.apply(self._places[index], flat, *hidden)  # pyright: ignore[reportReturnType]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Sequence[ParameterPlace], flat: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.places, ctx.like = places, (flat.shape, flat.dtype, flat.device)
        return tuple(h.view_as(h) for h in hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        shape, dtype, device = ctx.like
        whole = torch.zeros(shape, dtype=dtype, device=device)
        for place in ctx.places:
            if place.parameter.grad is not None:
                whole[place.start : place.stop].view(place.shape).copy_(place.parameter.grad)
                place.parameter.grad = None
        return None, whole, *gradients


def _flatten(block: nn.Module, prefix: str) -> list[ParameterPlace]:
    places: list[ParameterPlace] = []
    for name, parameter in block.named_parameters(prefix):
        places.append(ParameterPlace(name, parameter, places[-1].stop if places else 0, parameter.shape))
    flat = torch.cat([place.parameter.detach().reshape(-1) for place in places])
    for place in places:
        owner, _, own = place.name.removeprefix(f"{prefix}.").rpartition(".")
        # A plain attribute: the engine would slice every parameter that it can see.
        module = block.get_submodule(owner)
        module.__dict__[own] = module._parameters.pop(own)
        place.parameter.data = torch.empty(0, dtype=flat.dtype, device=flat.device)
    block.register_parameter(_FLAT, nn.Parameter(flat))
    return places
