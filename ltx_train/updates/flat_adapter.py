"""An adapter's weights and gradients as a few flat tensors: the one module that DeepSpeed's engine sees of an adapter.

The passes add to gradients on each rank as in a run without an engine. After the last pass of an optimizer step the
module's forward and backward hand all gradients over:

    passes: parameter.grad += ...   (views of the flat gradients)
    loss = FlatAdapter()            0; loss.backward(): flat.grad = flat gradient -> the engine's hooks reduce it

So passes may be CUDA graphs and stream weights, and ranks communicate once a step. In flat tensors a reduction has
dozens of hooks instead of thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.updates.unit_slices import Place

# Elements of a flat tensor, unless one parameter is larger.
_PIECE = 2**22


class FlatAdapter(nn.Module):
    """parameters: of the adapter, by name. They become views of the flat tensors by `bind`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.parameters_by_name = dict(parameters)
        self._places: list[list[Place]] = _pieces(parameters)
        self.flat = nn.ParameterList(
            torch.cat([parameters[place.name].detach().reshape(-1) for place in places]) for places in self._places
        )
        self._gradients = [torch.zeros_like(flat) for flat in self.flat]

    def bind(self) -> None:
        """Call it again whenever the flat tensors have got other memory."""
        for flat, gradient, places in zip(self.flat, self._gradients, self._places, strict=True):
            for place in places:
                parameter = self.parameters_by_name[place.name]
                parameter.data = flat.data[place.start : place.stop].view(place.shape)
                parameter.grad = gradient[place.start : place.stop].view(place.shape)

    def contents(self) -> dict[int, Sequence[Place]]:
        """What lies in each flat tensor, by its id."""
        return {id(flat): places for flat, places in zip(self.flat, self._places, strict=True)}

    def forward(self) -> Tensor:
        """A loss of 0, whose gradients are those that the passes have left."""
        return _HandOver.apply(self._gradients, *self.flat)  # pyright: ignore[reportReturnType]

    def zero_gradients(self) -> None:
        torch._foreach_zero_(self._gradients)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *flat: Tensor) -> Tensor:
        ctx.gradients = gradients
        return flat[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        return None, *ctx.gradients


def _pieces(parameters: Mapping[str, Tensor]) -> list[list[Place]]:
    pieces: list[list[Place]] = []
    for name, parameter in parameters.items():
        start = pieces[-1][-1].stop if pieces else _PIECE
        if start + parameter.numel() > _PIECE:
            pieces.append([])
            start = 0
        pieces[-1].append(Place(name=name, start=start, shape=parameter.shape))
    return pieces
