"""The collectives that a rank calls, as one object that tests can replace.

Owns their signatures. Which backend carries them is `ranks`' choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Collective = Callable[[Tensor, Tensor], None]
GatherObjects = Callable[[Any], list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Collectives of one process group. Every rank calls them in the same order, on its current stream.

    all_gather(whole, part): `whole` becomes all ranks' parts, by rank.
    reduce_scatter(part, whole): `part` becomes the sum over the ranks of this rank's slice of `whole`.
    all_reduce(values): `values` becomes its sum over the ranks.
    gather_objects(value): the values of all ranks, by rank, on the host.
    """

    rank: int
    world: int
    all_gather: Collective
    reduce_scatter: Collective
    all_reduce: Callable[[Tensor], None]
    gather_objects: GatherObjects


def single_process() -> Exchange:
    """The collectives of a run with one process: copies."""
    return Exchange(
        rank=0, world=1, all_gather=_copy, reduce_scatter=_copy, all_reduce=lambda _values: None,
        gather_objects=lambda value: [value],
    )  # fmt: skip


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
