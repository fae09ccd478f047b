"""Linear layers with quantized frozen weights: 8-bit weights, 4-bit weights, and float8 matrix products.

Owns their computation, in plain tensor operations that the compiler can fuse. `memory.weights.quantize` computes the
codes and scales. A compiled block that is recomputed keeps no dequantized weight for
backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = 448.0


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with weight (out, in), which `dense` dequantizes."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, **frozen: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        for name, tensor in frozen.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in) in `dtype`."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, self.dense(input.dtype), self.bias)


class ByteLinear(QuantizedLinear):
    """weight (out, in) int8 or float8, scale (out, 1): y = x (weight * scale)^T + bias, in the dtype of x."""

    scale: nn.Parameter

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias, weight=weight, scale=scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)


class NibbleLinear(QuantizedLinear):
    """4-bit codes with a scale and a shift per group of inputs: dense weight = codes * scale - shift.

    weight (out / 2, groups, in / groups) uint8: output channel i in the low four bits, i + out / 2 in the high four.
    scale and shift: (out, groups, 1).
    """

    scale: nn.Parameter
    shift: nn.Parameter

    def __init__(self, weight: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None) -> None:
        half, groups, size = weight.shape
        super().__init__((2 * half, groups * size), bias, weight=weight, scale=scale, shift=shift)

    def dense(self, dtype: torch.dtype) -> Tensor:
        # Broadcast bit shifts instead of a concatenation, because they compile to one elementwise kernel.
        bit_shifts = 4 * torch.arange(2, dtype=torch.uint8, device=self.weight.device)[:, None, None, None]
        codes = ((self.weight[None] >> bit_shifts) & 15).flatten(0, 1)
        return (codes.to(dtype) * self.scale.to(dtype) - self.shift.to(dtype)).flatten(1)


class Fp8Linear(QuantizedLinear):
    """Float8 matrix products for the output and the input gradient, with a scale per token and per output channel.

    weight (out, in) float8, scale (out, 1) float32. transposed: the same codes as (in, out). The hardware multiplies
    float8 only along contiguous rows, so both layouts are stored and backward copies neither.
    """

    scale: nn.Parameter
    transposed: nn.Parameter

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        codes, transposed = weight.contiguous(), weight.t().contiguous()
        shape = (weight.shape[0], weight.shape[1])
        super().__init__(shape, bias, weight=codes, scale=scale.float(), transposed=transposed)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        output: Any = _Float8Product.apply(input, self.weight, self.scale, self.transposed)  # pyright: ignore[reportArgumentType]
        bias = self._parameters["bias"]
        return output if bias is None else output + bias


class _Float8Product(torch.autograd.Function):
    """x (..., in) -> x W^T (..., out). The frozen weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, transposed: Tensor) -> Tensor:
        ctx.save_for_backward(scale, transposed)
        codes, rows = float8_rows(x.flatten(0, -2))
        product = _scaled_product(codes, weight.t(), rows, scale.t().contiguous(), x.dtype)
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        scale, transposed = ctx.saved_tensors
        gradient = gradients[0]
        # This product sums over the axis of the weight's scales, so the gradient is scaled before it is quantized.
        codes, rows = float8_rows(gradient.flatten(0, -2).float() * scale.t())
        ones = torch.ones(1, transposed.shape[0], device=scale.device)
        product = _scaled_product(codes, transposed.t(), rows, ones, gradient.dtype)
        return product.view(*gradient.shape[:-1], -1), None, None, None


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes and float32 scales (rows, 1) of a matrix; the largest magnitude of each row is mapped to 448."""
    values = x.float()
    scale = (values.abs().amax(dim=1, keepdim=True) / _FLOAT8_MAX).clamp_min(1e-12)
    return (values / scale).to(FLOAT8), scale


def _scaled_product(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) and b (K, N) column-major, both float8 -> (M, N): (a @ b) * rows (M, 1) * columns (1, N).

    The kernel with rowwise scales can only write bfloat16.
    """
    product = torch._scaled_mm(a, b, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=a.is_cuda)
    return product.to(dtype)
