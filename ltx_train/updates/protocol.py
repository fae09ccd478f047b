"""The interface of an optimizer step over all ranks' gradients, and what a checkpoint takes of it.

The implementations: `whole` (every rank updates every weight) and `sliced` (each rank updates a slice, ZeRO). Both
save and restore the same state by parameter name and number, so that a run may change between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltx_train.updates.slice_files import StateSlice


@dataclass(frozen=True, slots=True)
class TrainedState:
    """What a checkpoint takes: weights by name and `optimizer.state_dict()`, or this rank's slice of both."""

    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    slice: StateSlice | None = None


class Updates(Protocol):
    """Gradients accumulate in parameters over micro-batches; then come `average` and `step`, once an optimizer step."""

    optimizer: torch.optim.Optimizer

    @property
    def accumulating(self) -> list[nn.Parameter]:
        """Parameters whose `.grad` buffers are reused between passes, which CUDA graphs require."""
        ...

    def end_pass(self) -> None:
        """Called after each backward pass; a micro-batch in several modes has one for each mode."""
        ...

    def average(self) -> None:
        """The gradients of all micro-batches and ranks become their mean."""
        ...

    def norms(self) -> dict[str, Tensor]:
        """The averaged gradient's norm by part of the block, before clipping; empty where a rank has only a slice."""
        ...

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        """Clips to the norm `clip` (0: no clipping), updates the weights unless the norm is not finite or above
        `limit`, and resets the gradients. Returns the norm before clipping, a scalar on the device."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Elements of every trained parameter, by name."""
        ...

    def whole(self) -> AbstractContextManager[Any]:
        """Within the context, the trained weights are whole on every rank. Collective."""
        ...

    def awaited(self) -> str:
        """What this rank's device waits for now, in words; empty for nothing that is known. It asks no device."""
        ...

    def state(self) -> TrainedState: ...

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None: ...


def allocate_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Makes gradients before the first pass. Backward would otherwise allocate them among its activations, and the
    allocator could not give those segments back."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
