"""The optimizer of a setup, over the weights that a rank updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ltx_train.assembly import from_config, model_builder, resolve
from ltx_train.assembly.setup import Setup
from ltx_train.diffusion.objective import Predictor
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.updates.deepspeed_engine import open_engine
from ltx_train.updates.deepspeed_updates import AdapterUpdates, FullUpdates
from ltx_train.updates.flat_adapter import FlatAdapter
from ltx_train.updates.optimizers import build_optimizer
from ltx_train.updates.protocol import Updates
from ltx_train.updates.slice_files import MOMENTS
from ltx_train.updates.sliced import SlicedUpdates
from ltx_train.updates.sliced_parameters import SlicedParameters
from ltx_train.updates.whole import WholeUpdates


def open_for_training(setup: Setup, *, fresh: bool = True) -> tuple[Transformer, Updates]:
    """The transformer to train, and how its weights are updated."""
    if setup.sharing.slices_updates and not setup.sharing.by_deepspeed:
        transformer, parameters = model_builder.open_sliced(setup, fresh=fresh)
        return transformer, _sliced_updates(setup, transformer, parameters)
    transformer = model_builder.open_trainable(setup, fresh=fresh)
    if not setup.sharing.by_deepspeed:
        return transformer, whole_updates(setup, adapter.trainable_parameters(transformer))
    return transformer, (_full_updates if setup.sharing.full else _adapter_updates)(setup, transformer)


def predictor(transformer: Transformer, updates: Updates) -> Predictor:
    """What a pass calls: the transformer, or the engine around it."""
    return updates.engine if isinstance(updates, FullUpdates) else transformer


def _full_updates(setup: Setup, transformer: Transformer) -> FullUpdates:
    """DeepSpeed's engine around the transformer, all of whose weights it trains."""
    parameters = adapter.trainable_parameters(transformer)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    stage = setup.sharing.update_stage
    flat = model_builder.enter_through_hooks(setup, transformer) if stage == 3 else None
    return FullUpdates(
        _engine(setup, transformer), parameters, shapes, flat=flat, stage=stage, exchange=setup.ranks.exchange()
    )


def _adapter_updates(setup: Setup, transformer: Transformer) -> AdapterUpdates:
    """DeepSpeed's engine around the adapter alone."""
    flat = FlatAdapter(adapter.trainable_parameters(transformer))
    return AdapterUpdates(_engine(setup, flat), flat, stage=setup.sharing.update_stage, exchange=setup.ranks.exchange())


def _engine(setup: Setup, module: nn.Module) -> Any:
    visible = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(
        setup.optimizer, visible, from_config.optimizer_settings(setup.config),
        fused=True if setup.sharing.offload else None,
    )  # fmt: skip
    return open_engine(module, optimizer, resolve.engine_settings(setup.config, setup.sharing), setup.device)


def whole_updates(setup: Setup, parameters: Mapping[str, nn.Parameter]) -> WholeUpdates:
    """Every rank updates all of them."""
    optimizer = build_optimizer(setup.optimizer, parameters.values(), from_config.optimizer_settings(setup.config))
    return WholeUpdates(parameters, optimizer, setup.ranks, in_place=setup.memory.graphs)


def _sliced_updates(setup: Setup, transformer: Transformer, parameters: SlicedParameters) -> SlicedUpdates:
    sharing = setup.sharing
    optimizer = build_optimizer(
        setup.optimizer, parameters.masters.values(), from_config.optimizer_settings(setup.config),
        fused=True if sharing.offload else None,
    )  # fmt: skip
    parameters.place_moments(optimizer, MOMENTS)
    # Blocks of a full fine-tune are reduced by their backward marker from stage 2 on.
    by_marker = sharing.reduces_in_backward
    deferred = [unit for unit in parameters.units if not by_marker or unit == model_builder.OUTSIDE]
    return SlicedUpdates(
        parameters, optimizer, order=list(adapter.trainable_parameters(transformer)), deferred_units=deferred,
        reduce_each_pass=sharing.update_stage > 1, saves_slices=sharing.saves_slices, in_place=setup.memory.graphs,
    )  # fmt: skip
