"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    name: str, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw` (torch) or `adamw8bit` (bitsandbytes)."""
    parameters = list(parameters)
    if name == "adamw":
        fused = parameters[0].is_cuda
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    import bitsandbytes  # a second's import, for runs that use it

    optimizers: Any = bitsandbytes.optim
    return optimizers.AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
