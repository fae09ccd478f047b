"""Each rank updates its slice of every unit (ZeRO-1, 2 and 3), with elementwise optimizers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.model import adapter
from ltx_train.updates import slice_files
from ltx_train.updates.optimizers import step_within
from ltx_train.updates.protocol import TrainedState, allocate_gradients
from ltx_train.updates.slice_files import MOMENTS, StateSlice
from ltx_train.updates.sliced_parameters import ParameterPlace, SlicedParameters, Unit

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
        self._number = {name: number for number, name in enumerate(order)}
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

    def state(self) -> TrainedState:
        state = self.optimizer.state
        own = {
            name: {"master": master.detach(), **{k: state[master][k] for k in MOMENTS if k in state[master]}}
            for name, master in self._parameters.masters.items()
        }
        steps = state[next(iter(self._parameters.masters.values()))].get("step")
        # One group holds all masters here, one parameter a unit; a single process has one group of all parameters.
        # The numbers of that group are therefore written by name order and the rest of the group as it is.
        group = self.optimizer.state_dict()["param_groups"][0]
        groups = [{**group, "params": list(range(len(self._number)))}]
        if not self._saves_slices:
            return self._gathered(own, steps, groups)
        layout = {
            name: [(place.name, place.start, list(place.shape)) for place in unit.places]
            for name, unit in self._parameters.units.items()
        }
        exchange = self._parameters.exchange
        return TrainedState(
            slice=StateSlice(
                rank=exchange.rank, world=exchange.world, tensors=own, layout=layout, order=list(self._number),
                groups=groups, steps=None if steps is None else float(steps),
            )
        )  # fmt: skip

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        expected = {place.name: place.shape for unit in self._parameters.units.values() for place in unit.places}
        adapter.refuse_misfit(expected, slice_files.shapes(weights))
        for name, unit in self._parameters.units.items():
            master = self._parameters.masters[name]
            # Tensor by tensor: the whole state of a full fine-tune does not fit into one rank's memory.
            self._fill(master, [(place, lambda own=place.name: weights[own]) for place in unit.places])
            if optimizer["state"]:
                self.optimizer.state[master] = self._moments(master, unit, optimizer["state"])
        self._parameters.publish()

    def _moments(self, master: Tensor, unit: Unit, saved: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        numbered = [(place, saved[self._number[place.name]]) for place in unit.places]
        present = self.optimizer.state.get(master, {})
        state = {kind: present[kind] if kind in present else torch.zeros_like(master) for kind in MOMENTS}
        for kind, own in state.items():
            self._fill(own, [(place, lambda values=values, kind=kind: values[kind]) for place, values in numbered])
        steps = torch.as_tensor(numbered[0][1]["step"], dtype=torch.float32)
        # torch keeps the number of steps on the device that its kernel reads it from.
        fused = self.optimizer.param_groups[0].get("fused")
        return {**state, "step": steps.to(master.device if fused else "cpu", copy=True)}

    def _reduce(self) -> None:
        for name in self._deferred:
            self._parameters.reduce(name, in_place=self._in_place)

    def _fill(self, own: Tensor, sources: Sequence[tuple[ParameterPlace, Callable[[], Tensor]]]) -> None:
        """Copies the parts of tensors that lie in this rank's slice; tensors outside it are not read."""
        begin = own.numel() * self._parameters.exchange.rank
        for place, read in sources:
            first, last = max(place.start, begin), min(place.stop, begin + own.numel())
            if first < last:
                own[first - begin : last - begin].copy_(read().reshape(-1)[first - place.start : last - place.start])

    def _gathered(
        self, own: Mapping[str, Mapping[str, Tensor]], steps: Tensor | None, groups: list[Any]
    ) -> TrainedState:
        """The state as a single process would save it: for adapters, which are small."""
        state: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(self._number))}
        for name, unit in self._parameters.units.items():
            for kind in MOMENTS if steps is not None else ():
                whole = torch.empty(unit.size, device=self._parameters.device)
                self._parameters.exchange.all_gather(whole, own[name][kind])
                for place in unit.places:
                    state[self._number[place.name]][kind] = whole[place.start : place.stop].view(place.shape)
        if steps is None:
            state = {}
        weights = {name: p.detach() for name, p in self._parameters.parameters}
        optimizer = {"state": {n: {"step": steps, **s} for n, s in state.items()}, "param_groups": groups}
        return TrainedState(weights, optimizer)
