"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """kind: constant, linear or cosine from lr to final_lr until `steps`, after a linear warm-up of `warmup` steps."""

    kind: str
    lr: float
    final_lr: float
    warmup: int
    steps: int

    def at(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0). A schedule has no state, so resuming cannot shift it."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - progress if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_lr + (self.lr - self.final_lr) * left
