"""Blocks as flat parameters, for an engine that slices, gathers and reduces parameters by itself (DeepSpeed).

A block has some eighty tensors. Gathered and reduced one by one they cost the host more time than the block computes.
Here a block has two parameters: its frozen tensors as raw bytes, whatever their dtypes, and its trained ones.

    engine gathers both -> begin: the tensors become views of them -> the block computes -> end: they are empty again
    -> engine releases both

In backward the gradients of the trained tensors accumulate as usual. Behind the last of them, `attach` hands them to
the engine as one gradient of the flat parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.memory.weights.stream import TensorPlace, layout_of
from ltx_train.model.linear import remember_norms

_FROZEN, _TRAINED = "flat_frozen", "flat_trained"


@dataclass(frozen=True, slots=True)
class TrainedPlace:
    """A trained tensor inside its block's flat parameter; start counts elements."""

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
        self._frozen = [_flatten_frozen(block) for block in self._blocks]
        self._trained = [_flatten_trained(block) for block in self._blocks]

    def __contains__(self, index: int) -> bool:
        return bool(self._frozen[index] or self._trained[index])

    def contents(self) -> dict[nn.Parameter, Sequence[TrainedPlace]]:
        """What lies in each flat parameter that is trained."""
        return {
            getattr(block, _TRAINED): places
            for block, places in zip(self._blocks, self._trained, strict=True)
            if places
        }  # fmt: skip

    def begin(self, index: int, *, backward: bool, training: bool) -> None:
        block = self._blocks[index]
        if self._frozen[index]:
            flat: Tensor = getattr(block, _FROZEN).data
            for place in self._frozen[index]:
                part = flat[place.offset : place.offset + place.size]
                getattr(place.owner, place.name).data = part.view(place.dtype).view(place.shape)
        self._bind(index)

    def end(self, index: int) -> None:
        # A view would keep the gathered memory alive when the engine releases it.
        tensors = [getattr(place.owner, place.name) for place in self._frozen[index]]
        _empty([*tensors, *(place.parameter for place in self._trained[index])])

    def bind_trained(self) -> None:
        """Makes all trained tensors views of their flat parameters, which the engine has gathered."""
        for index in range(len(self._blocks)):
            self._bind(index)

    def release_trained(self) -> None:
        for index in range(len(self._blocks)):
            _empty([place.parameter for place in self._trained[index]])

    def _bind(self, index: int) -> None:
        if self._trained[index]:
            whole: Tensor = getattr(self._blocks[index], _TRAINED).data
            for place in self._trained[index]:
                place.parameter.data = whole[place.start : place.stop].view(place.shape)

    def attach(self, index: int, hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The block's input, unchanged. In backward, which comes here last of all, the block's gradients become the
        flat parameter's."""
        if not self._trained[index]:
            return tuple(hidden)
        flat = getattr(self._blocks[index], _TRAINED)
        return _Attach.apply(self._trained[index], flat, *hidden)  # pyright: ignore[reportReturnType]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Sequence[TrainedPlace], flat: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
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


def _flatten_frozen(block: nn.Module) -> list[TensorPlace]:
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
        _hide(place.owner, place.name)
    block.register_parameter(_FROZEN, nn.Parameter(flat, requires_grad=False))
    return places


def _flatten_trained(block: nn.Module) -> list[TrainedPlace]:
    named = [
        (owner, name, parameter)
        for owner in block.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    places: list[TrainedPlace] = []
    for _, _, parameter in named:
        places.append(TrainedPlace(parameter, places[-1].stop if places else 0, parameter.shape))
    if not places:
        return []
    flat = torch.cat([parameter.detach().reshape(-1) for _, _, parameter in named])
    for owner, name, parameter in named:
        parameter.data = torch.empty(0, dtype=flat.dtype, device=flat.device)
        _hide(owner, name)
    block.register_parameter(_TRAINED, nn.Parameter(flat))
    return places


def _empty(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _hide(owner: nn.Module, name: str) -> None:
    """Makes a parameter a plain attribute: the engine would slice every parameter that it can see."""
    parameter = owner._parameters.pop(name, None)
    if parameter is not None:
        owner.__dict__[name] = parameter
