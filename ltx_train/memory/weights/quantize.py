"""Quantizes the weights of the frozen blocks: optimum-quanto quantizes, this project's linear layers compute.

int8 and float8 have one scale per output channel, int4 one per group of up to 128 inputs. Embeddings, norms,
gates and projections outside the blocks keep their precision. Blocks are quantized one by one while
the checkpoint streams in.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ltx_train.model.byte_products import FLOAT8, TILE, rotated, row_codes
from ltx_train.model.loaders import BlockQuantizer
from ltx_train.model.quantized import ByteLinear, CodedLinear, NibbleLinear, QuantizedLinear

Quantizer = Callable[[nn.Linear], QuantizedLinear | None]

# The layers that process every video or text token. The others have too few rows for 8-bit products to pay off.
_MANY_ROWS = r"(attn1|attn2|ff)\..*|audio_to_video_attn\.to_(q|out\.0)|video_to_audio_attn\.to_(k|v)"
# The codes of 8-bit products, by `memory.compute`.
CODES = {"fp8": FLOAT8, "int8": torch.int8}


def block_quantizer(weights: str, compute: str = "bf16") -> BlockQuantizer | None:
    """Returns a function that quantizes a block in place, or None when nothing is quantized.

    weights: none, int8, int4 or float8. compute: bf16, or fp8 or int8 for 8-bit products in layers with many rows.
    """
    quantizer = QUANTIZERS[weights]
    if quantizer is None and compute == "bf16":
        return None
    return partial(_quantize, weights=quantizer, codes=CODES.get(compute))


def has_many_rows(name: str) -> bool:
    """Whether a block's layer of that name processes every video or text token."""
    return re.fullmatch(_MANY_ROWS, name) is not None


def _quantize(block: nn.Module, *, weights: Quantizer | None, codes: torch.dtype | None) -> None:
    for parent_name, parent in list(block.named_modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or name == "to_gate_logits":
                continue
            many_rows = has_many_rows(f"{parent_name}.{name}")
            coded = coded_layer(layer, codes) if codes is not None and many_rows else None
            quantized = coded or (weights(layer) if weights else None)
            if quantized is not None:
                setattr(parent, name, quantized)
    block.requires_grad_(False)
    _return_freed_pages()


def _bytes(layer: nn.Linear, kind: str) -> ByteLinear:
    """kind: quanto's qint8 or qfloat8."""
    quanto = _quanto()
    weight, qtype = layer.weight.detach(), getattr(quanto, kind)
    scale = quanto.AbsmaxOptimizer()(weight, qtype, 0)
    scale = torch.where(scale == 0, 1, scale)  # a row of zeros: its codes would be 0 / 0
    quantized = quanto.quantize_weight(weight, qtype, 0, scale, optimized=False)
    return ByteLinear(quantized._data, quantized._scale, layer.bias)


def _int4(layer: nn.Linear) -> NibbleLinear | None:
    """Returns None when the number of output channels is odd."""
    quanto = _quanto()
    weight = layer.weight.detach()
    outputs, inputs = weight.shape
    if outputs % 2:
        return None
    size = _group_size(inputs)
    scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, 0, size)
    quantized = quanto.quantize_weight(weight, quanto.qint4, 0, scale, shift, size, optimized=False)
    groups = inputs // size
    packed = quantized._data._data.view(outputs // 2, groups, size)
    return NibbleLinear(packed, scale.view(outputs, groups, 1), shift.view(outputs, groups, 1), layer.bias)


def coded_layer(layer: nn.Linear, dtype: torch.dtype) -> CodedLinear | None:
    """The layer with 8-bit products. None when a size is not a multiple of the hardware's tile.

    int8 codes are evenly spaced, so that one outlier of a token takes the precision of all its others: their products
    are rotated. float8 codes have an exponent each and are more precise as they are.
    """
    if layer.in_features % TILE or layer.out_features % TILE:
        return None
    weight = layer.weight.detach()
    group = _rotated_group(layer.in_features) if dtype == torch.int8 else 0
    if not group:
        return CodedLinear(*row_codes(weight, dtype), layer.bias)
    codes, scale = row_codes(rotated(weight.float(), group), dtype)
    return CodedLinear(codes, scale / group, layer.bias, group)


QUANTIZERS: dict[str, Quantizer | None] = {
    "none": None,
    "int8": partial(_bytes, kind="qint8"),
    "float8": partial(_bytes, kind="qfloat8"),
    "int4": _int4,
}


def _group_size(inputs: int) -> int:
    """The largest multiple of 32 up to 128 that divides `inputs`, otherwise `inputs` itself."""
    return next((size for size in (128, 96, 64, 32) if inputs % size == 0), inputs)


def _rotated_group(inputs: int) -> int:
    """The largest power of two up to 128 that divides `inputs`, a multiple of the tile."""
    return next(size for size in (128, 64, 32, 16) if inputs % size == 0)


def _quanto() -> Any:
    # Its import takes a second and prints warnings; only quantized runs need it.
    import optimum.quanto

    return optimum.quanto


def _return_freed_pages() -> None:
    """Makes glibc return the memory of the unquantized weights. Otherwise a model would load at twice its size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
