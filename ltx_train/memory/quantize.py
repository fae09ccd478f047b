"""int8 weights of the frozen blocks: optimum-quanto quantizes, our linear layer computes.

One scale per output channel. Embeddings, norms, gates and projections outside the blocks keep their
precision. Blocks are quantized one by one while the checkpoint streams in.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import nn

from ltx_train.model.linear import Int8Linear
from ltx_train.model.loaders import BlockQuantizer


def block_quantizer(name: str) -> BlockQuantizer | None:
    """`none` or `int8`."""
    return {"none": None, "int8": _int8}[name]


def _int8(block: nn.Module) -> None:
    # quanto's import costs a second and warns; only quantized runs pay for it.
    from optimum.quanto import QLinear, freeze, qint8, quantize

    quantize(block, weights=qint8, exclude="*to_gate_logits*")
    freeze(block)
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QLinear):
                setattr(parent, name, _plain(child))
    block.requires_grad_(False)
    _return_freed_pages()


def _plain(layer: Any) -> Int8Linear:
    """The same numbers without quanto's tensor subclass, which the compiler cannot see through."""
    return Int8Linear(layer.weight._data, layer.weight._scale, layer.bias)


def _return_freed_pages() -> None:
    """glibc keeps what the unquantized weights occupied; without this a model loads at twice its size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
