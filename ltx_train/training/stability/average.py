"""The exponential moving average of the trained weights, measured and published instead of the last step's weights.

Owns a float32 copy of every trained tensor and its exchange with the model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_RAMP = 10


class Average:
    """The effective decay is min(decay, (1 + step) / (10 + step)), because early weights are not worth averaging."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """Updates the average after optimizer step `step` (from 1)."""
        decay = min(self._decay, (1 + step) / (_RAMP + step))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in self._parameters.values()], 1 - decay)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Generator[None]:
        """A context in which the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            current = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(current)
