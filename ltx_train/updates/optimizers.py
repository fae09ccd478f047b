"""Makes an optimizer of a kind, and takes a step of it that can be skipped."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.updates.kinds import OptimizerKind


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Hyperparameters that all kinds share. Of `prodigy` the learning rate is a factor on its own estimate: 1 is
    usual."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


def build_optimizer(
    kind: OptimizerKind, parameters: Iterable[nn.Parameter], settings: OptimizerSettings, *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters, where the kind has it; None: on GPUs alone."""
    parameters = list(parameters)
    on_gpu = parameters[0].is_cuda
    make = _imported(kind.factory if on_gpu or kind.cpu_factory is None else kind.cpu_factory)
    extra = {"fused": on_gpu if fused is None else fused} if kind.fused else {}
    with redirect_stdout(io.StringIO()):  # prodigyopt prints its weight decay
        return make(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay,
            **kind.arguments, **extra,
        )  # fmt: skip


def _imported(factory: str) -> Any:
    """The class `module:name`. bitsandbytes takes a second to import, which only runs that use it pay for."""
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)


def step_within(optimizer: torch.optim.Optimizer, norm: Tensor, limit: Tensor | None = None) -> None:
    """Updates the weights unless the gradient norm is not finite or above the limit. A skipped step changes neither
    weights nor moments.

    Fused kernels decide where the parameters are (torch's AMP interface: `found_inf`). Other optimizers make the host
    wait.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        flagged: Any = optimizer
        # Parameters in host memory: the flag must have arrived before the kernel reads it, and torch would copy it
        # without waiting. On the parameters' own device this copy is none.
        place = optimizer.param_groups[0]["params"][0].device
        flagged.found_inf, flagged.grad_scale = (~_is_fine(norm, limit)).float().to(place), None
        optimizer.step()
    elif bool(_is_fine(norm, limit)):
        optimizer.step()


def _is_fine(norm: Tensor, limit: Tensor | None) -> Tensor:
    finite = torch.isfinite(norm)
    return finite if limit is None else finite & (norm <= limit)
