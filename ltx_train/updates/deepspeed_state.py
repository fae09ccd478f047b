"""What DeepSpeed's optimizers hold: this rank's flat slices of masters and moments, read and filled.

Owns every access to the internals of those optimizers. Checkpoints stay this project's own.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ltx_train.distributed.exchange import Exchange
from ltx_train.model import adapter
from ltx_train.updates import slice_files
from ltx_train.updates.slice_files import MOMENTS
from ltx_train.updates.unit_slices import Place, UnitSlice, UnitSlices

# By unit: where it begins in a flat master, how long it is, and its parameters.
_Units = dict[str, tuple[int, int, list[Place]]]


class EngineState:
    """zero: DeepSpeed's optimizer around torch's. contents: what lies in each parameter that DeepSpeed sees, by its id.
    order: the trained parameters as a single process numbers them.

    Up to stage 2 a group of parameters is one flat tensor that is cut into equal parts: one unit. At stage 3 every
    parameter is cut by itself: a unit each, named after the first tensor in it.
    """

    def __init__(
        self, zero: Any, contents: Mapping[int, Sequence[Place]], order: Sequence[str], *, stage: int,
        exchange: Exchange,
    ) -> None:  # fmt: skip
        self._zero, self._contents, self._order = zero, contents, order
        self._stage, self._exchange = stage, exchange

    def slices(self) -> UnitSlices:
        """Of a state in files the tensors are copies in host memory, otherwise DeepSpeed's own."""
        units: dict[str, UnitSlice] = {}
        steps: float | None = None
        for number, (flat, places) in enumerate(self._masters()):
            with self._present(number):
                state = self._zero.optimizer.state.get(flat, {})
                steps = float(state["step"]) if "step" in state else None
                tensors = {"master": flat.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}
                if self._in_files(number):
                    tensors = {kind: tensor.clone() for kind, tensor in tensors.items()}
            for name, (start, length, within) in places.items():
                own = {kind: tensor[start : start + length] for kind, tensor in tensors.items()}
                units[name] = UnitSlice(places=within, master=own.pop("master"), moments=own)
        group = {k: v for k, v in self._zero.optimizer.param_groups[0].items() if not k.startswith("_ds")}
        return UnitSlices(units=units, exchange=self._exchange, order=self._order, group=group, steps=steps)

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Fills masters and moments from a checkpoint; the model's weights do not follow yet."""
        slices, saved, torchs = self.slices(), optimizer["state"], self._zero.optimizer
        expected = {place.name: place.shape for unit in slices.units.values() for place in unit.places}
        adapter.refuse_misfit(expected, slice_files.shapes(weights))
        slices.fill_masters(weights)
        for number, (flat, names) in enumerate(self._masters()):
            with self._present(number, changed=True):
                if self._in_files(number):
                    torch.cat([slices.units[name].master for name in names], out=flat.detach())
                if not saved:
                    continue
                moments = [slices.saved_moments(name, saved) for name in names]
                values = {kind: torch.cat([of_unit[kind] for of_unit in moments]) for kind in MOMENTS}
                place = flat.device if torchs.param_groups[0].get("fused") else "cpu"
                steps = torch.as_tensor(saved[0]["step"], dtype=torch.float32).to(place, copy=True)
                torchs.state[flat] = {**values, "step": steps}

    def publish(self) -> None:
        """The sliced weights of stage 3 become their masters' values."""
        for number, group in enumerate(self._zero.fp16_partitioned_groups_flat):
            with self._present(number):
                group.copy_(self._zero.fp32_partitioned_groups_flat[number])
        # hpZ: the next gather would take the second slice of the weights from before.
        self._zero.invalidate_secondary_tensor()
        persistent = self._zero.persistent_parameters
        if persistent:
            # Weights too small to be sliced are whole on every rank.
            persistent[0].all_gather(persistent)

    def _in_files(self, number: int) -> bool:
        """Whether a sub-group's state is in files. DeepSpeed keeps small ones in host memory."""
        return self._stage == 3 and bool(self._zero._swappable_optimizer_subgroup(number))

    @contextmanager
    def _present(self, number: int, *, changed: bool = False) -> Generator[None]:
        """Within the context a sub-group's state in files is in memory. changed: it is written back afterwards."""
        if not self._in_files(number):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(number)
        try:
            yield
        finally:
            if changed:
                self._zero._optimizer_states_and_gradient_swap_out(number)
            else:
                self._zero._release_swap_buffers(number)

    def _masters(self) -> list[tuple[Tensor, _Units]]:
        """This rank's flat masters, and the units in each."""
        zero = self._zero
        masters: Sequence[Tensor] = (
            zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat
        )
        places = self._grouped() if self._stage < 3 else self._single()
        return list(zip(masters, places, strict=True))

    def _grouped(self) -> list[_Units]:
        zero = self._zero
        groups: list[_Units] = []
        every = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for number, (parameters, offsets) in enumerate(every):
            within = [
                replace(place, start=offset + place.start)
                for parameter, offset in zip(parameters, offsets, strict=True)
                for place in self._contents[id(parameter)]
            ]
            length = zero.single_partition_of_fp32_groups[number].numel()
            groups.append({f"group.{number}": (0, length, within)})
        return groups

    def _single(self) -> list[_Units]:
        groups: list[_Units] = []
        for parameters in self._zero.fp16_groups:
            start, units = 0, _Units()
            for parameter in parameters:
                length, within = parameter.partition_numel(), list(self._contents[id(parameter)])
                units[within[0].name] = (start, length, within)
                start += length
            groups.append(units)
        return groups
