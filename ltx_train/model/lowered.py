"""A block's low-rank matrices in the dtype that the block computes in: one cast there, one sum of gradients back.

Matrix by matrix, casts and sums are more launches than the products that they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.model.linear import LowRankLinear


class Lowered:
    """The adapter of one block. Between `lower` and the end of its backward pass, its layers compute with copies of
    their matrices; gradients are added to the matrices' own."""

    def __init__(self, block: nn.Module) -> None:
        layers = [m for m in block.modules() if isinstance(m, LowRankLinear)]
        self._layers = [m for m in layers if len(m.active_adapters) == 1]
        weights = [(m.lora_A[m.active_adapters[0]].weight, m.lora_B[m.active_adapters[0]].weight) for m in self._layers]
        self.matrices: list[Any] = [matrix for pair in weights for matrix in pair]

    def lower(self, dtype: torch.dtype) -> None:
        """Nothing happens where the matrices are in that dtype, or none of them is trained."""
        trained = [matrix for matrix in self.matrices if matrix.requires_grad and matrix.dtype != dtype]
        if len(trained) < len(self.matrices) or not trained:
            return
        copies: Any = _Copies.apply(self, dtype, *self.matrices)  # pyright: ignore[reportArgumentType]
        for layer, down, up in zip(self._layers, copies[::2], copies[1::2], strict=True):
            layer.lowered = (down, up)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """To the matrices' own; the copies are done with."""
        for layer in self._layers:
            layer.lowered = None
        pairs = [(m, g) for m, g in zip(self.matrices, gradients, strict=True) if g is not None]
        raised = [torch.empty_like(matrix) for matrix, _ in pairs]
        if not raised:
            return
        torch._foreach_copy_(raised, [gradient for _, gradient in pairs])
        known = [(m.grad, more) for (m, _), more in zip(pairs, raised, strict=True) if m.grad is not None]
        if known:
            torch._foreach_add_([own for own, _ in known], [more for _, more in known])
        for (matrix, _), first in zip(pairs, raised, strict=True):
            if matrix.grad is None:
                matrix.grad = first


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Lowered, dtype: torch.dtype, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.owner = owner
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(matrix, dtype=dtype) for matrix in matrices]
        torch._foreach_copy_(copies, matrices)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.owner.add(gradients)
        return (None,) * (2 + len(gradients))
