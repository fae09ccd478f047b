"""Runs blocks whose weights another engine gathers with hooks on the blocks' calls (DeepSpeed's ZeRO-3).

    transformer -> HookedRunner -> block(...)
        hooks gather -> BlockRunner: recompute, compile -> Block.forward -> hooks release

The hooks stay outside what is compiled and recomputed. In backward they gather before the recomputation begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.memory.weights.flat_blocks import FlatBlocks
from ltx_train.model.transformer import Block, Pair


class _Beside:
    """What a block reads beside its tokens. No tuple: the hooks would wait for the gradient of every tensor in one,
    among them some that no block uses, and never release the block's weights."""

    def __init__(self, arguments: Sequence[Any], flags: Mapping[str, bool]) -> None:
        self.arguments, self.flags = arguments, flags


class HookedRunner(BlockRunner):
    """blocks: their calls lead to this runner from now on. flat: their weights."""

    def __init__(self, blocks: Sequence[Block], keep: Sequence[Keep], *, compiled: bool, flat: FlatBlocks) -> None:
        super().__init__(keep, compiled=compiled, stream=flat)
        self.flat = flat
        for index, block in enumerate(blocks):
            block.forward = partial(self._entered, index, block)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, index: int, block: Block, video: Any, audio: Any, *rest: Any, **flags: bool) -> Pair:
        if torch.is_grad_enabled():
            # The hooks see the gradient of a block's input alone, so the first block's has to have one as well.
            video, audio = (None if h is None else h if h.requires_grad else h.requires_grad_() for h in (video, audio))
        return block(video, audio, _Beside(rest, flags))

    def _entered(self, index: int, block: Block, video: Any, audio: Any, beside: _Beside) -> Pair:
        if torch.is_grad_enabled():
            attached = iter(self.flat.attach(index, [h for h in (video, audio) if h is not None]))
            video, audio = (None if h is None else next(attached) for h in (video, audio))
        return super().__call__(index, block, video, audio, *beside.arguments, **beside.flags)
