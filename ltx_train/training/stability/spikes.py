"""What the norm of a gradient usually is, and how far above that it may be before a step is left out.

Owns the running mean. It lives on the device, so that judging a step waits for nothing; norms are equal on all
ranks, and so is what follows from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# So many accepted steps come before the first judgement, and so many the mean looks back over.
_SETTLED, _MEMORY = 20, 100


class Spikes:
    """factor: a norm above so many times the mean of those accepted before is one."""

    def __init__(self, factor: float, device: torch.device) -> None:
        self._factor = factor
        self._mean, self._count = torch.zeros(2, device=device).unbind()

    def limit(self) -> Tensor:
        """The largest norm that the next step may have: a float32 scalar on the device."""
        return torch.where(self._count < _SETTLED, torch.inf, self._factor * self._mean)

    def record(self, norm: Tensor, limit: Tensor) -> None:
        """A step's norm and what its limit was."""
        accepted = torch.isfinite(norm) & (norm <= limit)
        count = self._count + accepted
        step = (norm - self._mean) / count.clamp(1, _MEMORY)
        self._mean = torch.where(accepted, self._mean + step, self._mean)
        self._count = count

    def state(self) -> list[float]:
        return [float(self._mean), float(self._count)]

    def restore(self, state: list[float]) -> None:
        self._mean, self._count = torch.tensor(state, device=self._mean.device).unbind()
