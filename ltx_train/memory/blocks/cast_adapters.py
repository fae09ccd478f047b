"""A block's low-rank matrices in the dtype that the block computes in: one cast in forward, one accumulation of their
gradients in backward.

Matrix by matrix, casts and accumulations are more kernel launches than the products that they serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.model.linear import LowRankLinear


class CastAdapters:
    """The adapter of one block. Between `cast` and the end of its backward pass, the block's layers compute with copies
    of their matrices; gradients of the copies are added to the gradients of the float32 matrices."""

    def __init__(self, block: nn.Module) -> None:
        layers = [m for m in block.modules() if isinstance(m, LowRankLinear)]
        self._layers = [m for m in layers if len(m.active_adapters) == 1]
        weights = [(m.lora_A[m.active_adapters[0]].weight, m.lora_B[m.active_adapters[0]].weight) for m in self._layers]
        self.matrices: list[Any] = [matrix for pair in weights for matrix in pair]

    def cast(self, dtype: torch.dtype) -> None:
        """Does nothing where the matrices have that dtype, or where one of them is not trained."""
        trained = [matrix for matrix in self.matrices if matrix.requires_grad and matrix.dtype != dtype]
        if len(trained) < len(self.matrices) or not trained:
            return
        copies: Any = _Copies.apply(self, dtype, *self.matrices)  # pyright: ignore[reportArgumentType]
        for layer, down, up in zip(self._layers, copies[::2], copies[1::2], strict=True):
            layer.cast_pair = (down, up)

    def accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds the copies' gradients to those of the matrices; the layers forget the copies."""
        for layer in self._layers:
            layer.cast_pair = None
        pairs = [(m, g) for m, g in zip(self.matrices, gradients, strict=True) if g is not None]
        float32 = [torch.empty_like(matrix) for matrix, _ in pairs]
        if not float32:
            return
        torch._foreach_copy_(float32, [gradient for _, gradient in pairs])
        existing = [(m.grad, more) for (m, _), more in zip(pairs, float32, strict=True) if m.grad is not None]
        if existing:
            torch._foreach_add_([own for own, _ in existing], [more for _, more in existing])
        for (matrix, _), first in zip(pairs, float32, strict=True):
            if matrix.grad is None:
                matrix.grad = first


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: CastAdapters, dtype: torch.dtype, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.owner = owner
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(matrix, dtype=dtype) for matrix in matrices]
        torch._foreach_copy_(copies, matrices)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.owner.accumulate(gradients)
        return (None,) * (2 + len(gradients))
