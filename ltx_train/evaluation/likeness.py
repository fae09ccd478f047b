"""How alike references and their own targets are, beyond what other clips' references are: finds copies.

Owns the comparison of latents; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltx_train.contracts import Batch, ModalityName, Mode


def beyond_chance(own: Sequence[float], other: Sequence[float]) -> float | None:
    """(own - other) / (1 - other) of mean cosines: 1 for copies, 0 for references no nearer than any other.

    None when there is nothing to compare: no reference, no other identity, or grids that do not match.
    """
    if not own or not other:
        return None
    near, far = sum(own) / len(own), sum(other) / len(other)
    return (near - far) / max(1e-6, 1 - far)


def cosines(mode: Mode, batch: Batch) -> list[float]:
    """Of every sample's references with its target, the best over all shifts in time."""
    found: list[float] = []
    for condition in mode.references:
        target = batch.video_latent if condition.stream is ModalityName.video else batch.audio_latent
        reference = batch.references.get(condition.name)
        if target is None or reference is None or target.shape[3:] != reference.shape[3:]:
            continue
        pairs = zip(_steps(reference), _steps(target), strict=True)
        found += [_best(r, t) for r, t in pairs]
    return found


def _steps(latent: Tensor) -> Tensor:
    """(B, C, T, ...) to (B, T, values of a step), float32."""
    return latent.float().movedim(2, 1).flatten(2)


def _best(reference: Tensor, target: Tensor) -> float:
    short, long = sorted((reference, target), key=len)
    windows = long.unfold(0, len(short), 1).transpose(1, 2).flatten(1)
    return float(torch.cosine_similarity(windows, short.flatten()[None], dim=1).max())
