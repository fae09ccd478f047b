"""The running mean of the gradient norm, and the limit above which a step is skipped as a spike.

Owns the running mean. It stays on the device, so that the host does not wait for the decision to skip a step. Norms
are equal on all ranks, and so are the limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Number of accepted steps before the first limit applies, and number of steps that the mean covers.
_WARMUP, _WINDOW = 20, 100


class Spikes:
    """factor: a norm above `factor` times the mean of the accepted norms is a spike."""

    def __init__(self, factor: float, device: torch.device) -> None:
        self._factor = factor
        self._mean, self._count = torch.zeros(2, device=device).unbind()

    def limit(self) -> Tensor:
        """The largest accepted norm of the next step: a float32 scalar on the device, infinite at first."""
        return torch.where(self._count < _WARMUP, torch.inf, self._factor * self._mean)

    def record(self, norm: Tensor, limit: Tensor) -> None:
        """Adds the norm of a step to the mean, if it is finite and within its limit."""
        accepted = torch.isfinite(norm) & (norm <= limit)
        count = self._count + accepted
        step = (norm - self._mean) / count.clamp(1, _WINDOW)
        self._mean = torch.where(accepted, self._mean + step, self._mean)
        self._count = count

    def state(self) -> list[float]:
        return [float(self._mean), float(self._count)]

    def restore(self, state: list[float]) -> None:
        self._mean, self._count = torch.tensor(state, device=self._mean.device).unbind()
