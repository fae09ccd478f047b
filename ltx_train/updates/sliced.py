"""Each rank updates its slice of every unit (ZeRO-1, 2 and 3), with elementwise optimizers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.model import adapter
from ltx_train.updates import slice_files
from ltx_train.updates.optimizers import step_within
from ltx_train.updates.protocol import TrainedState, allocate_gradients
from ltx_train.updates.slice_files import MOMENTS
from ltx_train.updates.sliced_parameters import SlicedParameters
from ltx_train.updates.unit_slices import Place, UnitSlice, UnitSlices

# torch.nn.utils.clip_grad_norm_ adds the same to the norm; equal losses on one and on several ranks depend on it.
_CLIP_EPS = 1e-6


class SlicedUpdates:
    """AdamW over the slices of `SlicedParameters`.

    order: the parameters' names in the order in which a single process numbers them.
    deferred_units: units that `end_pass` or `average` reduces, instead of the block's backward marker.
    reduce_each_pass: deferred units are reduced after every micro-batch (ZeRO-2) instead of once per step (ZeRO-1).
    saves_slices: every rank saves its slice; otherwise the leading rank saves the whole state.
    in_place: the gradients of deferred units keep their memory between passes.
    """

    def __init__(
        self, parameters: SlicedParameters, optimizer: torch.optim.Optimizer, *, order: Sequence[str],
        deferred_units: Sequence[str], reduce_each_pass: bool, saves_slices: bool, in_place: bool,
    ) -> None:  # fmt: skip
        self._parameters, self.optimizer, self._deferred = parameters, optimizer, deferred_units
        self._order = order
        self._reduce_each_pass, self._saves_slices, self._in_place = reduce_each_pass, saves_slices, in_place
        if in_place:
            allocate_gradients(self.accumulating)

    @property
    def accumulating(self) -> list[nn.Parameter]:
        return [place.parameter for name in self._deferred for place in self._parameters.units[name].places]

    def end_pass(self) -> None:
        if self._reduce_each_pass:
            self._reduce()

    def average(self) -> None:
        if not self._reduce_each_pass:
            self._reduce()
        self._parameters.wait_for_gradients()

    def norms(self) -> dict[str, Tensor]:
        return {}

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        """norm -> scale -> step -> zero -> publish, in this order on every rank.

        The norm is collective and decides for all ranks alike whether the step is taken. Gradients are scaled before
        the step because the optimizer reads them, and zeroed after it. Publishing comes last and always: it is
        collective, so a skipped step must not skip it on one rank.
        """
        norm = self._parameters.norm()
        if clip > 0:
            self._parameters.scale_gradients(torch.clamp(clip / (norm + _CLIP_EPS), max=1.0))
        step_within(self.optimizer, norm, limit)
        self._parameters.zero_gradients()
        self._parameters.publish()
        return norm

    def sizes(self) -> Mapping[str, int]:
        units = self._parameters.units.values()
        numbers = {place.name: place.shape.numel() for unit in units for place in unit.places}
        return {name: numbers[name] for name in self._order}

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def awaited(self) -> str:
        return self._parameters.awaited()

    def state(self) -> TrainedState:
        slices = self._slices()
        return slices.own() if self._saves_slices else slices.gathered()

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        expected = {place.name: place.shape for unit in self._parameters.units.values() for place in unit.places}
        adapter.refuse_misfit(expected, slice_files.shapes(weights))
        slices, saved = self._slices(), optimizer["state"]
        slices.fill_masters(weights)
        for name in self._parameters.units if saved else ():
            master = self._parameters.masters[name]
            # torch keeps the number of steps on the device that its kernel reads it from.
            place = master.device if self.optimizer.param_groups[0].get("fused") else "cpu"
            steps = torch.as_tensor(saved[0]["step"], dtype=torch.float32).to(place, copy=True)
            self.optimizer.state[master] = {**slices.saved_moments(name, saved), "step": steps}
        self._parameters.publish()

    def _slices(self) -> UnitSlices:
        state, masters = self.optimizer.state, self._parameters.masters
        steps = state[next(iter(masters.values()))].get("step")
        units = {
            name: UnitSlice(
                places=[Place(name=p.name, start=p.start, shape=p.shape) for p in unit.places], master=masters[name],
                moments={kind: state[masters[name]][kind] for kind in MOMENTS if kind in state[masters[name]]},
            )
            for name, unit in self._parameters.units.items()
        }  # fmt: skip
        return UnitSlices(
            units=units, exchange=self._parameters.exchange, order=self._order,
            group=self.optimizer.state_dict()["param_groups"][0], steps=None if steps is None else float(steps),
        )  # fmt: skip

    def _reduce(self) -> None:
        for name in self._deferred:
            self._parameters.reduce(name, in_place=self._in_place)
