"""A checkpoint's tensors as slices in one file per rank, read again by parameter name on any number of ranks.

Owns `shard-<rank>-of-<world>.safetensors` (flat slices by unit and kind) and `shards.json` (the place of every
parameter in them). Whether a checkpoint is complete is decided by `training.checkpoints.commit`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltx_train.contracts import DataError

MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUT = "shards.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSlice:
    """One rank's slice of weights and optimizer state.

    tensors: by unit, then `master` or one of MOMENTS: flat float32, of equal length on all ranks. layout: the
    parameters of each unit as (name, first element, shape). order: parameter names as the optimizer numbers them.
    steps: the optimizer's own count, None before its first step.
    """

    rank: int
    world: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    layout: Mapping[str, Sequence[tuple[str, int, list[int]]]]
    order: Sequence[str]
    groups: Sequence[Mapping[str, Any]]
    steps: float | None

    @property
    def file(self) -> str:
        return _file(self.rank, self.world)


def write(folder: Path, state: StateSlice) -> None:
    """Writes this rank's tensors; rank 0 writes the layout too."""
    flat = {f"{unit}/{kind}": tensor for unit, kinds in state.tensors.items() for kind, tensor in kinds.items()}
    save_file(flat, folder / state.file)
    if state.rank == 0:
        layout = {
            "world": state.world, "layout": state.layout, "order": list(state.order), "groups": list(state.groups),
            "steps": state.steps,
        }  # fmt: skip
        (folder / LAYOUT).write_text(json.dumps(layout))


class SlicedState:
    """The state in a folder of slices, by parameter name. Tensors are read at each access."""

    def __init__(self, folder: Path) -> None:
        layout = json.loads((folder / LAYOUT).read_text())
        self._folder, self._world, self._steps = folder, layout["world"], layout["steps"]
        self._order, self.groups = layout["order"], layout["groups"]
        self._files: dict[int, Any] = {}
        self._places = {
            name: (unit, start, shape) for unit, places in layout["layout"].items() for name, start, shape in places
        }

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Float32, by plain name."""
        readers = {name: partial(self._read, "master", name) for name in self._order}
        return _LazyTensors(readers, {name: torch.Size(self._places[name][2]) for name in self._order})

    @property
    def optimizer(self) -> dict[str, Any]:
        """In the form of a single process's `optimizer.state_dict()`."""
        state: dict[int, Mapping[str, Tensor]] = {}
        for number, name in enumerate(self._order if self._steps is not None else ()):
            readers = {kind: partial(self._read, kind, name) for kind in MOMENTS}
            state[number] = _LazyTensors({"step": partial(torch.tensor, self._steps), **readers})
        return {"state": state, "param_groups": self.groups}

    def _read(self, kind: str, name: str) -> Tensor:
        """A parameter that lies in the slices of one or more ranks."""
        unit, start, shape = self._places[name]
        stop = start + math.prod(shape)
        length = self._slice(0, unit, kind).get_shape()[0]
        parts: list[Tensor] = []
        for rank in range(start // length, -(-stop // length)):
            first, last = max(start, rank * length) - rank * length, min(stop, (rank + 1) * length) - rank * length
            parts.append(self._slice(rank, unit, kind)[first:last])
        return torch.cat(parts).view(shape) if parts else torch.empty(shape)

    def _slice(self, rank: int, unit: str, kind: str) -> Any:
        path = self._folder / _file(rank, self._world)
        if not path.is_file():
            raise DataError(f"{path} is missing: the checkpoint is not whole")
        if rank not in self._files:
            self._files[rank] = safe_open(path, framework="pt")  # pyright: ignore[reportNoOverloadImplementation]
        return self._files[rank].get_slice(f"{unit}/{kind}")


def shapes(tensors: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
    """Shapes by name. Of tensors in slices no file is read for it: those of a full fine-tune take minutes."""
    known = tensors.shapes if isinstance(tensors, _LazyTensors) else None
    return known or {name: tensor.shape for name, tensor in tensors.items()}


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read at each access. shapes: theirs, where they are known without reading."""

    def __init__(self, readers: Mapping[str, partial[Tensor]], shapes: Mapping[str, torch.Size] | None = None) -> None:
        self._readers, self.shapes = readers, shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _file(rank: int, world: int) -> str:
    return f"shard-{rank:05d}-of-{world:05d}.safetensors"
