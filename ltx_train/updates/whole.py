"""Every rank has every gradient and updates every weight: single, DDP, and ZeRO-3 of a frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.distributed.ranks import Ranks
from ltx_train.model import adapter
from ltx_train.updates import slice_files
from ltx_train.updates.optimizers import step_within
from ltx_train.updates.protocol import TrainedState, allocate_gradients


class WholeUpdates:
    """in_place: gradients keep their memory between steps."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks, *, in_place: bool
    ) -> None:
        self._named, self._parameters = parameters, list(parameters.values())
        self.optimizer, self._ranks, self._in_place = optimizer, ranks, in_place
        if in_place:
            allocate_gradients(self._parameters)

    @property
    def accumulating(self) -> list[nn.Parameter]:
        return self._parameters

    def end_pass(self) -> None:
        pass

    def average(self) -> None:
        # A mode without samples on this rank leaves no gradient. Zeros keep the moments equal on all ranks.
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.average([p.grad for p in self._parameters if p.grad is not None])

    def norms(self) -> dict[str, Tensor]:
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                groups.setdefault(adapter.module_group(name), []).append(parameter.grad)
        return {group: torch.nn.utils.get_total_norm(grads) for group, grads in groups.items()}

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, clip if clip > 0 else float("inf"))
        step_within(self.optimizer, norm, limit)
        self.optimizer.zero_grad(set_to_none=not self._in_place)
        return norm

    def sizes(self) -> Mapping[str, int]:
        return {name: parameter.numel() for name, parameter in self._named.items()}

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def awaited(self) -> str:
        return ""

    def state(self) -> TrainedState:
        return TrainedState({name: p.detach() for name, p in self._named.items()}, self.optimizer.state_dict())

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        adapter.refuse_misfit(slice_files.shapes(self._named), slice_files.shapes(weights))
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(weights[name])
        # `dict(values)` reads the tensors of a sliced checkpoint, which are lazy until here.
        state = {number: dict(values) for number, values in optimizer["state"].items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": optimizer["param_groups"]})
