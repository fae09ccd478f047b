"""This rank's slices of masters and moments, by unit: what a checkpoint takes of them and how it fills them.

Engines that slice updates differ in who owns the slices and in how parameters lie in them. This module knows flat
slices of equal length on all ranks, and where each parameter begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltx_train.distributed.exchange import Exchange
from ltx_train.updates.protocol import TrainedState
from ltx_train.updates.slice_files import MOMENTS, StateSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a parameter lies in its unit. start: its first element in the whole unit."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSlice:
    """A unit's slice on this rank. master: float32, flat; rank r has elements r * length to (r + 1) * length of the
    unit. moments: by kind, as long as the master; empty before the first step."""

    places: Sequence[Place]
    master: Tensor
    moments: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By kind, `master` first."""
        return {"master": self.master.detach(), **self.moments}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSlices:
    """All slices of this rank. Every rank calls every method in the same order.

    order: the parameters' names as a single process numbers them. group: the optimizer's group of hyperparameters.
    steps: the optimizer's own count; None before its first step.
    """

    units: Mapping[str, UnitSlice]
    exchange: Exchange
    order: Sequence[str]
    group: Mapping[str, Any]
    steps: float | None

    def own(self) -> TrainedState:
        """This rank's slice, for checkpoints of one file per rank."""
        layout = {
            name: [(place.name, place.start, list(place.shape)) for place in unit.places]
            for name, unit in self.units.items()
        }
        tensors = {name: unit.tensors for name, unit in self.units.items()}
        return TrainedState(
            slice=StateSlice(
                rank=self.exchange.rank, world=self.exchange.world, tensors=tensors, layout=layout,
                order=list(self.order), groups=self._groups(), steps=self.steps,
            )
        )  # fmt: skip

    def gathered(self) -> TrainedState:
        """The state as a single process would save it: for adapters, which are small."""
        weights: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(self.order))}
        numbers = {name: number for number, name in enumerate(self.order)}
        for unit in self.units.values():
            for kind, part in unit.tensors.items():
                whole = torch.empty(part.numel() * self.exchange.world, device=part.device, dtype=part.dtype)
                self.exchange.all_gather(whole, part.contiguous())
                for place in unit.places:
                    values = whole[place.start : place.stop].view(place.shape)
                    if kind == "master":
                        weights[place.name] = values
                    else:
                        moments[numbers[place.name]][kind] = values
        steps = None if self.steps is None else torch.tensor(self.steps)
        state = {} if steps is None else {number: {"step": steps, **values} for number, values in moments.items()}
        return TrainedState(
            {name: weights[name] for name in self.order}, {"state": state, "param_groups": self._groups()}
        )

    def _groups(self) -> list[dict[str, Any]]:
        # One group holds the slices here; a single process has one group of all parameters, by number.
        return [{**self.group, "params": list(range(len(self.order)))}]

    @torch.no_grad()
    def fill_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Tensor by tensor: the whole state of a full fine-tune does not fit into one rank's memory."""
        for unit in self.units.values():
            self._fill(unit.master, [(place, lambda name=place.name: weights[name]) for place in unit.places])

    @torch.no_grad()
    def saved_moments(self, name: str, saved: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A unit's moments by kind, filled from the state of a checkpoint by number."""
        numbers = {own: number for number, own in enumerate(self.order)}
        unit = self.units[name]
        filled = {kind: unit.moments.get(kind, torch.zeros_like(unit.master)) for kind in MOMENTS}
        for kind, own in filled.items():
            self._fill(own, [(p, lambda at=numbers[p.name], kind=kind: saved[at][kind]) for p in unit.places])
        return filled

    def _fill(self, own: Tensor, sources: Sequence[tuple[Place, Callable[[], Tensor]]]) -> None:
        """Copies the parts of tensors that lie in this rank's slice; tensors outside it are not read."""
        begin = own.numel() * self.exchange.rank
        for place, read in sources:
            first, last = max(place.start, begin), min(place.stop, begin + own.numel())
            if first < last:
                own[first - begin : last - begin].copy_(read().reshape(-1)[first - place.start : last - place.start])
