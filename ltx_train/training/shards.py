"""A checkpoint's tensors spread over files, one from each rank, and read again by parameter name on any number.

Owns `shard-<rank>-of-<world>.safetensors`, flat shares by unit and kind, and `shards.json`, which says where in
them a parameter lies. When a checkpoint counts is `checkpointing`'s.
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


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of the state. tensors: by unit, then master or one of MOMENTS, flat float32 shares of equal
    length on all ranks. layout: of each unit the parameters (name, first element, shape). order: parameters as the
    optimizer numbers them. steps: the optimizer's own count, None before its first."""

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


def write(folder: Path, shard: Shard) -> None:
    """This rank's tensors; the first rank says where what lies."""
    flat = {f"{unit}/{kind}": tensor for unit, kinds in shard.tensors.items() for kind, tensor in kinds.items()}
    save_file(flat, folder / shard.file)
    if shard.rank == 0:
        about = {
            "world": shard.world, "layout": shard.layout, "order": list(shard.order), "groups": list(shard.groups),
            "steps": shard.steps,
        }  # fmt: skip
        (folder / LAYOUT).write_text(json.dumps(about))


class Sharded:
    """The state in a folder of shards, by parameter name; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / LAYOUT).read_text())
        self._folder, self._world, self._steps = folder, about["world"], about["steps"]
        self._order, self.groups = about["order"], about["groups"]
        self._files: dict[int, Any] = {}
        self._places = {
            name: (unit, start, shape) for unit, places in about["layout"].items() for name, start, shape in places
        }

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By plain name, float32."""
        return _Lazy({name: partial(self._read, "master", name) for name in self._order})

    @property
    def optimizer(self) -> dict[str, Any]:
        """As `optimizer.state_dict()` of one process has it."""
        state: dict[int, Mapping[str, Tensor]] = {}
        for number, name in enumerate(self._order if self._steps is not None else ()):
            readers = {kind: partial(self._read, kind, name) for kind in MOMENTS}
            state[number] = _Lazy({"step": partial(torch.tensor, self._steps), **readers})
        return {"state": state, "param_groups": self.groups}

    def _read(self, kind: str, name: str) -> Tensor:
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


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are read each time they are asked for."""

    def __init__(self, readers: Mapping[str, partial[Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _file(rank: int, world: int) -> str:
    return f"shard-{rank:05d}-of-{world:05d}.safetensors"
