"""Linear layers with a low-rank adapter and keyed dropout; gathering rows of a table; norms of a layer's weight.

Owns these computations in a form that suits the compiler: the dropout masks are stateless, so recompute needs no saved
random state and a captured graph can replay them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from ltx_train.model.quantized import QuantizedLinear

_KEEP_BITS = 24


class LowRankLinear(PeftLinear):
    """peft's LoRA layer with the low-rank products in the activations' dtype.

    peft casts the activations to the adapter's float32, which makes the low-rank products slower than the base's.
    mask_keys (B,) int32: the keys of this step's dropout masks, set by `adapter.DropoutKeys`.
    """

    mask_keys: Tensor | None = None
    # A and B in the activations' dtype, during a training pass of the block (`memory.blocks.cast_adapters`).
    cast_pair: tuple[Tensor, Tensor] | None = None
    # Index of this rank's token slice under sequence parallelism.
    token_slice: int = 0

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            down, up = self.low_rank(name, x.dtype)
            result = self.plus(result, F.linear(self._dropped(x, name), down), down, up, name)
        return result

    def low_rank(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) in `dtype`."""
        if self.cast_pair is not None and torch.is_grad_enabled():
            return self.cast_pair
        layers: Any = (self.lora_A[name], self.lora_B[name])
        return layers[0].weight.to(dtype), layers[1].weight.to(dtype)

    def plus(self, result: Tensor, inner: Tensor, down: Tensor, up: Tensor, name: str) -> Tensor:
        """The layer's output (..., out) from the base layer's `result` (..., out) and `inner` = A x (..., rank)."""
        added = F.linear(inner, up) * self.scaling[name]
        return self._with_dora(result, added, down, up, name) if name in self.lora_magnitude_vector else result + added

    def add_magnitude(self, name: str) -> None:
        """Adds DoRA's magnitudes, initialized to the norms of the base's rows so that the output is unchanged."""
        layer: Any = self.get_base_layer()
        with torch.no_grad():
            part: Any = self.lora_B[name]
            norms = row_norms(layer).to(part.weight.device)
        self.lora_magnitude_vector[name] = Magnitude(norms.clone())

    def _with_dora(self, result: Tensor, added: Tensor, down: Tensor, up: Tensor, name: str) -> Tensor:
        """m / |W + s B A| (W x + s B A x) + bias; the norm is treated as a constant (DoRA, section 4.3)."""
        base: Any = self.get_base_layer()
        magnitude: Any = self.lora_magnitude_vector[name]
        factor = (magnitude.weight / self._row_norms(down, up, name)).to(result.dtype)
        if base.bias is None:
            return (result + added) * factor
        bias = base.bias.to(result.dtype)
        return (result - bias + added) * factor + bias

    @torch.no_grad()
    def _row_norms(self, down: Tensor, up: Tensor, name: str) -> Tensor:
        """(out,) float32 norms of the rows of W + s B A; the sum is formed in the dtype of A and B."""
        layer: Any = self.get_base_layer()
        base = layer.dense(up.dtype) if isinstance(layer, QuantizedLinear) else layer.weight.to(up.dtype)
        return torch.linalg.vector_norm(base + self.scaling[name] * (up @ down), dim=1, dtype=torch.float32)

    def dropout_rate(self, name: str) -> float:
        layer = self.lora_dropout[name]
        return layer.p if isinstance(layer, nn.Dropout) else 0.0

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        rate = self.dropout_rate(name)
        if rate == 0 or not self.training:
            return x
        if self.mask_keys is None:
            raise RuntimeError("dropout without keys: call adapter.DropoutKeys.set before each training step")
        kept = keyed_mask(self.mask_keys, x.shape[1:], rate, self.token_slice * x.shape[1:].numel())
        return torch.where(kept, x / (1 - rate), torch.zeros_like(x))


def products(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs of several layers for the same x. If no adapter applies dropout, one product gives all A x."""
    adapted: list[Any] = [layer for layer in layers if isinstance(layer, LowRankLinear) and _without_dropout(layer)]
    if len(adapted) < len(layers):
        return [layer(x) for layer in layers]
    names: list[str] = [layer.active_adapters[0] for layer in adapted]
    pairs = [layer.low_rank(name, x.dtype) for layer, name in zip(adapted, names, strict=True)]
    inner = F.linear(x, torch.cat([down for down, _ in pairs])).split([len(down) for down, _ in pairs], dim=-1)
    return [
        layer.plus(layer.base_layer(x), part, *pair, name)
        for layer, part, pair, name in zip(adapted, inner, pairs, names, strict=True)
    ]


def _without_dropout(layer: LowRankLinear) -> bool:
    """Whether the layer has one active adapter that reads its input without dropout."""
    active = layer.active_adapters
    if layer.disable_adapters or len(active) != 1:
        return False
    return not layer.training or layer.dropout_rate(active[0]) == 0


class Magnitude(nn.Module):
    """DoRA's trained magnitudes: weight (out,) float32, the factors of the normalized rows."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)


def keyed_mask(keys: Tensor, shape: torch.Size, rate: float, first: int = 0) -> Tensor:
    """(B, *shape) bool, True with probability 1 - rate, from a hash of the sample's key and the element's index.

    keys: (B,) int32. first: index of the first element. The hash applies murmur3's 32-bit finalizer to the index, and
    again to the xor of that result and the key.
    """
    indices = torch.arange(first, first + shape.numel(), dtype=torch.int32, device=keys.device).view(shape)
    mixed = mix(mix(indices)[None] ^ keys.view(-1, *(1 for _ in shape)))
    return (mixed & ((1 << _KEEP_BITS) - 1)) >= int(rate * (1 << _KEEP_BITS))


def mix(h: Tensor) -> Tensor:
    """murmur3's fmix32 on int32. Products wrap around; shifts are masked because int32 shifts extend the sign."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    return h ^ ((h >> 16) & 0xFFFF)


class _Rows(torch.autograd.Function):
    """values[index] with a matrix product as its backward. The usual kernel adds the gradients of thousands of tokens
    to the same few rows one after the other."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(values)
        return values[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        hits = index.flatten()[None] == torch.arange(ctx.count, device=index.device)[:, None]
        return hits.to(gradient.dtype) @ gradient, None


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values (U, D) gathered by index (B, T) -> (B, T, D)."""
    rows: Any = _Rows.apply(values, index)  # pyright: ignore[reportArgumentType]
    return rows


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer in float32, dequantized if it is quantized."""
    if isinstance(layer, QuantizedLinear):
        return layer.dense(torch.float32)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def remember_norms(block: nn.Module) -> None:
    """Stores the row norms of every linear layer on the layer, for use while its weights are not on the device."""
    layers: list[Any] = [m for m in block.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        layer.row_norms = row_norms(layer)


def row_norms(layer: nn.Module) -> Tensor:
    """(out,) float32: the norm of each row of W, from `remember_norms` if it was called."""
    stored = getattr(layer, "row_norms", None)
    return torch.linalg.vector_norm(dense_weight(layer), dim=1) if stored is None else stored


def frobenius(layer: nn.Module) -> float:
    """The Frobenius norm of a linear layer's weight."""
    return float(torch.linalg.vector_norm(row_norms(layer)))
