"""Finds clips that show or sound the same, also when one of them was encoded again.

Owns the signature of a sample: its latents, projected on few numbers. Pure but for the keyed projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_train import rng
from ltx_train.data.index import Index
from ltx_train.data.reader import AUDIO, VIDEO

# Cosine of two signatures from which on they are of one recording. Of bundled clips encoded again it is at least 0.97,
# of different ones at most 0.86.
_ONE = 0.92
_NUMBERS, _CELLS = 256, 4
# Pairs of more samples than these would take minutes.
_MOST = 20_000
_FLAT = 1e-6


def signature(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """A unit vector of what changes in a sample over time: its sound, or without sound its pictures. None when nothing
    does."""
    if AUDIO in tensors:
        course = tensors[AUDIO].float()
        course = course - course.mean(dim=1, keepdim=True)
    elif VIDEO in tensors and tensors[VIDEO].shape[1] > 1:
        small = F.adaptive_avg_pool2d(tensors[VIDEO].float().movedim(1, 0), _CELLS)
        course = small[1:] - small[:-1]
    else:
        return None
    if float(course.std()) < _FLAT:
        return None
    projected = course.flatten() @ _projection(course.numel())
    return F.normalize(projected, dim=0)


@lru_cache(maxsize=8)
def _projection(size: int) -> Tensor:
    return rng.normal((size, _NUMBERS), 0, "copies", str(size))


def pairs(index: Index, signatures: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Keys of samples of one recording, each pair once; parts of one row are no copies of each other."""
    records = [record for record in index.records if record.key in signatures]
    by_shape: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_shape.setdefault(record.shape, []).append(number)
    for numbers in by_shape.values():
        if not 1 < len(numbers) <= _MOST:
            continue
        stacked = torch.stack([signatures[records[n].key] for n in numbers])
        for row in range(len(numbers) - 1):
            alike = (stacked[row + 1 :] @ stacked[row] > _ONE).nonzero().flatten().tolist()
            first = records[numbers[row]]
            for offset in alike:
                second = records[numbers[row + 1 + offset]]
                if first.recording != second.recording:
                    yield min(first.key, second.key), max(first.key, second.key)
