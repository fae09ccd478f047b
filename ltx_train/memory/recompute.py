"""How each block is run: what of it is kept for backward, whether it is compiled, whether it is streamed.

Owns the choice per block and the order of the wrappers: markers of the weight stream outside, the
checkpoint inside them, the compiled block innermost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ltx_train.memory.stream import WeightStream, mark
from ltx_train.model.transformer import Block, Pair

Call = Callable[..., Pair]


class Keep(StrEnum):
    """What of a block stays in memory between forward and backward.

    everything: nothing is computed twice. attention: attention outputs stay, the rest is computed
    again. inputs: the whole block is computed again.
    """

    everything = "everything"
    attention = "attention"
    inputs = "inputs"


class BlockRunner:
    """`transformer.run_block`: calls block `index` the way it was planned."""

    def __init__(self, keep: Sequence[Keep], *, compiled: bool, stream: WeightStream | None = None) -> None:
        self._keep, self.stream = list(keep), stream
        call = torch.compile(_call, fullgraph=True) if compiled else _call
        self._calls: dict[Keep, Call] = {
            Keep.everything: call,
            Keep.inputs: partial(_recomputed, call),
            Keep.attention: torch.compile(_keeping_attention, fullgraph=True) if compiled else _keeping_attention,
        }

    def __call__(self, index: int, block: Block, *arguments: Any) -> Pair:
        if not torch.is_grad_enabled():
            return self._unmarked(index, self._calls[Keep.everything], block, *arguments)
        call = self._calls[self._keep[index]]
        if self.stream is None or index not in self.stream:
            return call(block, *arguments)
        return self._marked(index, call, block, *arguments)

    def _unmarked(self, index: int, call: Call, block: Block, *arguments: Any) -> Pair:
        """Without gradients: validation and sampling."""
        stream = self.stream
        if stream is None or index not in stream:
            return call(block, *arguments)
        stream.begin(index, backward=False, training=False)
        result = call(block, *arguments)
        stream.end(index)
        return result

    def _marked(self, index: int, call: Call, block: Block, video: Any, audio: Any, *rest: Any) -> Pair:
        stream = self.stream
        assert stream is not None
        # The marker behind the first block's gradient fires only if its input wants one.
        video, audio = (None if h is None else h if h.requires_grad else h.requires_grad_() for h in (video, audio))
        stream.begin(index, backward=False, training=True)
        pair = call(block, *mark(stream, index, False, (video, audio)), *rest)
        stream.end(index)
        return mark(stream, index, True, pair)


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced: streamed blocks get compute between them to hide behind."""
    return [i for i in range(total) if (i * count) // total != ((i + 1) * count) // total]


def _call(block: Block, *arguments: Any) -> Pair:
    return block(*arguments)


def _recomputed(call: Call, block: Block, *arguments: Any) -> Pair:
    result: Any = checkpoint(call, block, *arguments, use_reentrant=False)
    return result


def _keeping_attention(block: Block, video: Any, audio: Any, *rest: Any) -> Pair:
    contexts = partial(create_selective_checkpoint_contexts, _attention_policy)
    result: Any = checkpoint(lambda v, a: block(v, a, *rest), video, audio, use_reentrant=False, context_fn=contexts)
    return result


def _attention_policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operation in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
