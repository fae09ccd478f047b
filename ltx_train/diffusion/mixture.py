"""Assigns a mode to each sample of a batch when a run mixes several modes.

The draw is keyed by sample, so a sample's mode does not depend on its batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import Batch, Mode

Weighted = Sequence[tuple[float, Mode]]


def parts(batch: Batch, modes: Weighted, seed: int) -> list[tuple[Mode, Batch]]:
    """Splits a batch into one batch per drawn mode, in the modes' order. Modes without samples are left out."""
    if len(modes) == 1:
        return [(modes[0][1], batch)]
    edges = list(accumulate(weight for weight, _ in modes))
    samples: list[list[int]] = [[] for _ in modes]
    for number, (key, draw) in enumerate(zip(batch.keys, batch.draws, strict=True)):
        point = float(rng.uniform(seed, "mode", key, draw)) * edges[-1]
        samples[min(bisect_right(edges, point), len(modes) - 1)].append(number)
    pairs = zip(modes, samples, strict=True)
    return [(mode, select(batch, numbers)) for (_, mode), numbers in pairs if numbers]


def select(batch: Batch, numbers: Sequence[int]) -> Batch:
    """The batch of the samples at these indices."""
    chosen: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, tuple):
            chosen[field.name] = tuple(value[n] for n in numbers)
        elif isinstance(value, dict):
            chosen[field.name] = {name: tensor[list(numbers)] for name, tensor in value.items()}
        elif isinstance(value, Tensor):
            chosen[field.name] = value[list(numbers)]
    return replace(batch, **chosen)
