"""Quantized weights of the frozen blocks: optimum-quanto makes the numbers, our linear layers compute.

int8 and float8 have one scale per output channel, int4 groups of up to 128 inputs. Embeddings, norms,
gates and projections outside the blocks keep their precision. Blocks are quantized one by one while
the checkpoint streams in.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ltx_train.model.loaders import BlockQuantizer
from ltx_train.model.quantized import ByteLinear, Fp8Linear, NibbleLinear, QuantizedLinear, float8_rows

Quantizer = Callable[[nn.Linear], QuantizedLinear | None]

# The layers that see every video or text token: the others have too few rows for quantizing them to pay.
MANY_ROWS = r"(attn1|attn2|ff)\..*|audio_to_video_attn\.to_(q|out\.0)|video_to_audio_attn\.to_(k|v)"


def block_quantizer(weights: str, compute: str = "bf16") -> BlockQuantizer | None:
    """weights: none, int8, int4 or float8; compute: bf16, or fp8 for products in float8 where many rows are."""
    quantizer = QUANTIZERS[weights]
    if quantizer is None and compute == "bf16":
        return None
    return partial(_quantize, weights=quantizer, fp8=compute == "fp8")


def _quantize(block: nn.Module, *, weights: Quantizer | None, fp8: bool) -> None:
    for parent_name, parent in list(block.named_modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or name == "to_gate_logits":
                continue
            many_rows = re.fullmatch(MANY_ROWS, f"{parent_name}.{name}") is not None
            made = _fp8(layer) if fp8 and many_rows else weights(layer) if weights else None
            if made is not None:
                setattr(parent, name, made)
    block.requires_grad_(False)
    _return_freed_pages()


def _bytes(layer: nn.Linear, kind: str) -> ByteLinear:
    """kind: quanto's qint8 or qfloat8."""
    quanto = _quanto()
    weight, qtype = layer.weight.detach(), getattr(quanto, kind)
    scale = quanto.AbsmaxOptimizer()(weight, qtype, 0)
    made = quanto.quantize_weight(weight, qtype, 0, scale, optimized=False)
    return ByteLinear(made._data, made._scale, layer.bias)


def _int4(layer: nn.Linear) -> NibbleLinear | None:
    """None when the output channels do not pair up."""
    quanto = _quanto()
    weight = layer.weight.detach()
    outputs, inputs = weight.shape
    if outputs % 2:
        return None
    size = _group_size(inputs)
    scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, 0, size)
    made = quanto.quantize_weight(weight, quanto.qint4, 0, scale, shift, size, optimized=False)
    groups = inputs // size
    packed = made._data._data.view(outputs // 2, groups, size)
    return NibbleLinear(packed, scale.view(outputs, groups, 1), shift.view(outputs, groups, 1), layer.bias)


def _fp8(layer: nn.Linear) -> Fp8Linear | None:
    """None where the hardware's tiles of 16 do not fit."""
    if layer.in_features % 16 or layer.out_features % 16:
        return None
    codes, scale = float8_rows(layer.weight.detach())
    return Fp8Linear(codes, scale, layer.bias)


QUANTIZERS: dict[str, Quantizer | None] = {
    "none": None,
    "int8": partial(_bytes, kind="qint8"),
    "float8": partial(_bytes, kind="qfloat8"),
    "int4": _int4,
}


def _group_size(inputs: int) -> int:
    """128, or the largest multiple of 32 below that divides the inputs, or all of them."""
    return next((size for size in (128, 96, 64, 32) if inputs % size == 0), inputs)


def _quanto() -> Any:
    # Its import costs a second and warns; only quantized runs pay for it.
    import optimum.quanto

    return optimum.quanto


def _return_freed_pages() -> None:
    """glibc keeps what the unquantized weights occupied; without this a model loads at twice its size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
