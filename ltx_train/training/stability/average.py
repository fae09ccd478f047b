"""The exponential moving average of the trained weights: what is measured and published instead of the last step's.

Owns a float32 copy of every trained tensor and its exchange with the model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_RAMP = 10


class Average:
    """decay is reached gradually, min(decay, (1 + step) / (10 + step)): early on there is little worth keeping."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """After optimizer step `step` (from 1)."""
        decay = min(self._decay, (1 + step) / (_RAMP + step))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in self._parameters.values()], 1 - decay)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model with the averaged weights, within the context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
