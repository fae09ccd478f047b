"""The optimizer of a configuration, over the weights that a rank updates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ltx_train.commands import session, transformers
from ltx_train.config import Config
from ltx_train.memory.shares import Shares
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.training.optim import build_optimizer
from ltx_train.training.ranks import Ranks
from ltx_train.training.shards import MOMENTS
from ltx_train.training.updates import SharedUpdates, Updates, WholeUpdates


def opened(config: Config, ranks: Ranks, *, fresh: bool = True) -> tuple[Transformer, Updates]:
    """The transformer to train and how its weights are updated, as the strategy says."""
    if not session.shares_updates(config):
        transformer = transformers.trainable(config, fresh=fresh, ranks=ranks)
        return transformer, whole(config, adapter.trainable_parameters(transformer), ranks)
    transformer, shares = transformers.shared(config, ranks, fresh=fresh)
    return transformer, _shared(config, transformer, shares)


def whole(config: Config, parameters: Mapping[str, nn.Parameter], ranks: Ranks) -> Updates:
    """Every rank updates all of them."""
    optim = config.optim
    optimizer = build_optimizer(
        optim.name, parameters.values(), optim.lr, (optim.betas[0], optim.betas[1]), optim.weight_decay
    )
    return WholeUpdates(parameters, optimizer, ranks, in_place=bool(config.memory.graphs))


def _shared(config: Config, transformer: Transformer, shares: Shares) -> Updates:
    optim, full, name = config.optim, config.adapter.kind == "full", config.strategy.name
    optimizer = build_optimizer(
        optim.name, shares.masters.values(), optim.lr, (optim.betas[0], optim.betas[1]), optim.weight_decay,
        fused=True if config.strategy.offload else None,
    )  # fmt: skip
    shares.lay_out(optimizer, MOMENTS)
    order = list(adapter.trainable_parameters(transformer))
    left = [unit for unit in shares.units if name == "zero1" or not full or unit == "outside"]
    return SharedUpdates(
        shares, optimizer, order, left, early=name != "zero1", sharded=full, in_place=bool(config.memory.graphs)
    )
