"""The linear layer of a frozen base with an adapter: the low-rank addition and its keyed dropout.

Owns how the addition computes, written for the compiler: stateless masks need no random state to
be saved and restored around a recomputation, and a captured graph can replay them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from ltx_train.model.quantized import QuantizedLinear

_KEEP_BITS = 24


class LowRankLinear(PeftLinear):
    """peft's LoRA layer with the low-rank products in the activations' dtype.

    peft raises the activations to the adapter's float32 for them, which costs more than the base's products.
    mask_keys (B,) int32 are this step's keys of the dropout masks; `adapter.DropoutKeys` sets them.
    """

    mask_keys: Tensor | None = None

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            layers: Any = (self.lora_A[name], self.lora_B[name])
            down, up = (layer.weight.to(x.dtype) for layer in layers)
            result = result + F.linear(F.linear(self._dropped(x, name), down), up) * self.scaling[name]
        return result

    def dropout_rate(self, name: str) -> float:
        layer = self.lora_dropout[name]
        return layer.p if isinstance(layer, nn.Dropout) else 0.0

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        rate = self.dropout_rate(name)
        if rate == 0 or not self.training:
            return x
        if self.mask_keys is None:
            raise RuntimeError("dropout without keys: adapter.DropoutKeys.set comes before a training step")
        kept = keyed_mask(self.mask_keys, x.shape[1:], rate)
        return torch.where(kept, x / (1 - rate), torch.zeros_like(x))


def keyed_mask(keys: Tensor, shape: torch.Size, rate: float) -> Tensor:
    """(B, *shape) bool, True with probability 1 - rate: a hash of each sample's key and the place within it.

    The hash is murmur3's 32-bit finalizer, once over the place and once over the result and the key.
    """
    places = torch.arange(shape.numel(), dtype=torch.int32, device=keys.device).view(shape)
    mixed = mix(mix(places)[None] ^ keys.view(-1, *(1 for _ in shape)))
    return (mixed & ((1 << _KEEP_BITS) - 1)) >= int(rate * (1 << _KEEP_BITS))


def mix(h: Tensor) -> Tensor:
    """murmur3's fmix32 on int32, whose products wrap; shifts are masked because int32 shifts keep the sign."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    return h ^ ((h >> 16) & 0xFFFF)


def dense_weight(layer: nn.Module) -> Tensor:
    """The float32 weight of a linear layer, dequantized if need be."""
    if isinstance(layer, QuantizedLinear):
        return layer.dense(torch.float32)
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
