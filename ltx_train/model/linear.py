"""The two linear layers of a frozen base with an adapter: int8 weights, and the low-rank addition.

Owns how they compute. Both are written for the compiler: inside a compiled block the dequantized
weight is never kept for backward, it is made again from the int8 one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """weight (out, in) int8 and scale (out, 1): y = x (weight * scale)^T + bias, in the dtype of x."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        weight = self.weight.to(input.dtype) * self.scale.to(input.dtype)
        return F.linear(input, weight, self.bias)


class LowRankLinear(PeftLinear):
    """peft's LoRA layer with the low-rank products in the activations' dtype.

    peft raises the activations to the adapter's float32 for them, which costs more than the base's products.
    """

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            layers: Any = (self.lora_A[name], self.lora_B[name])
            down, up = (layer.weight.to(x.dtype) for layer in layers)
            result = result + F.linear(F.linear(self.lora_dropout[name](x), down), up) * self.scaling[name]
        return result


def dense_weight(layer: nn.Module) -> Tensor:
    """The float32 weight of a linear layer, dequantized if need be."""
    if isinstance(layer, Int8Linear):
        return layer.weight.float() * layer.scale.float()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def remember_norms(block: nn.Module) -> None:
    """Stores |W| of every linear layer on the layer, for when its weights are elsewhere."""
    layers: list[Any] = [m for m in block.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        layer.frobenius = float(torch.linalg.vector_norm(dense_weight(layer)))


def frobenius(layer: nn.Module) -> float:
    """|W| of a linear layer."""
    known = getattr(layer, "frobenius", None)
    return known if known is not None else float(torch.linalg.vector_norm(dense_weight(layer)))
