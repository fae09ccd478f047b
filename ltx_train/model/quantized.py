"""Linear layers with quantized frozen weights: 8-bit weights, 4-bit weights, and 8-bit matrix products.

Owns their computation, in plain tensor operations that the compiler can fuse; the products themselves are operators of
`byte_products`. `memory.weights.quantize` computes the codes and scales. A compiled block that is recomputed keeps no
dequantized weight for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx_train.model import byte_products


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
        return byte_products.dense(self.weight, self.scale, dtype)


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


class CodedLinear(ByteLinear):
    """8-bit products for the output and the input gradient: float8 or int8 by the dtype of the weight's codes.

    weight (out, in), scale (out, 1) float32. The input and the gradient get codes with a scale per token. group: size
    of the groups in which the weight is rotated, and the input with it; 0 where they are not. dequantizes: whether the
    products are those of the dequantized weight instead.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int = 0) -> None:
        super().__init__(weight.contiguous(), scale.float(), bias)
        self.group, self.dequantizes = group, False

    def dense(self, dtype: torch.dtype) -> Tensor:
        coded = super().dense(torch.float32 if self.group else dtype)
        return byte_products.rotated(coded, self.group).to(dtype) if self.group else coded

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        multiplied = byte_products.dense_product if self.dequantizes else byte_products.product
        output = multiplied(self._rotated(input), self.weight, self.scale)
        bias = self._parameters["bias"]
        return output if bias is None else output + bias

    def error(self, input: Tensor) -> Tensor:  # noqa: A002
        """The error of the 8-bit product of this input (`byte_products.error`), a float32 scalar."""
        return byte_products.error(self._rotated(input), self.weight, self.scale)

    def _rotated(self, input: Tensor) -> Tensor:  # noqa: A002
        return byte_products.rotated(input, self.group) if self.group else input
