"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Schedule:
    """kind: constant, linear or cosine from lr to final_lr over `steps`, after `warmup` linear steps from 0."""

    kind: str
    lr: float
    final_lr: float
    warmup: int
    steps: int

    def at(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0); stateless, so resuming cannot shift it."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - progress if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_lr + (self.lr - self.final_lr) * left


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, *,
    fused: bool | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """`adamw` (torch; fused: in one kernel, null for GPUs alone), `adamw8bit` and `paged_adamw8bit` (bitsandbytes; the
    latter's moments may leave a full GPU), or `prodigy` (prodigyopt), whose learning rate is a factor on its own
    estimate: 1 is the usual one."""
    parameters = list(parameters)
    if name == "adamw":
        fused = parameters[0].is_cuda if fused is None else fused
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    if name == "prodigy":
        return _prodigy(parameters, lr, betas, weight_decay)
    import bitsandbytes  # a second's import, for runs that use it

    optimizers: Any = bitsandbytes.optim
    # Only a GPU's memory can be paged.
    paged = name == "paged_adamw8bit" and parameters[0].is_cuda
    kind = optimizers.PagedAdamW8bit if paged else optimizers.AdamW8bit
    return kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def _prodigy(
    parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    import prodigyopt

    kind: Any = prodigyopt.Prodigy
    with redirect_stdout(io.StringIO()):  # it announces its weight decay
        return kind(
            parameters, lr=lr, betas=betas, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True
        )
