"""Activation recomputation: a block keeps its inputs only and runs again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ltx_train.model.transformer import Block, Pair, Transformer


def recompute_blocks(transformer: Transformer) -> None:
    """Every block is recomputed in backward; without gradients nothing changes."""
    transformer.run_block = _recomputed


def _recomputed(block: Block, *arguments: Any) -> Pair:
    if not torch.is_grad_enabled():
        return block(*arguments)
    result: Any = checkpoint(block, *arguments, use_reentrant=False)
    return result
