"""Likeness: how much more references resemble their own targets than other clips' references do. Finds copies.

Owns the comparison of latents; needs no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltx_train.contracts import Batch, ModalityName, Mode


def beyond_chance(correct: Sequence[float], wrong: Sequence[float]) -> float | None:
    """(correct - wrong) / (1 - wrong) of mean cosines: 1 for copies, 0 if the correct references are no more similar.

    None without values to compare: no reference, no other identity, or latent grids that do not match.
    """
    if not correct or not wrong:
        return None
    correct_mean, wrong_mean = sum(correct) / len(correct), sum(wrong) / len(wrong)
    return (correct_mean - wrong_mean) / max(1e-6, 1 - wrong_mean)


def cosines(mode: Mode, batch: Batch) -> list[float]:
    """Cosine similarity of every sample's references with its target, the maximum over all shifts in time.

    Skips references whose grid (all dimensions after time) differs from the target's.
    """
    similarities: list[float] = []
    for condition in mode.references:
        target = batch.video_latent if condition.stream is ModalityName.video else batch.audio_latent
        reference = batch.references.get(condition.name)
        if target is None or reference is None or target.shape[3:] != reference.shape[3:]:
            continue
        pairs = zip(_steps(reference), _steps(target), strict=True)
        similarities += [_best(r, t) for r, t in pairs]
    return similarities


def _steps(latent: Tensor) -> Tensor:
    """(B, C, T, ...) to (B, T, values per time step), float32."""
    return latent.float().movedim(2, 1).flatten(2)


def _best(reference: Tensor, target: Tensor) -> float:
    short, long = sorted((reference, target), key=len)
    windows = long.unfold(0, len(short), 1).transpose(1, 2).flatten(1)
    return float(torch.cosine_similarity(windows, short.flatten()[None], dim=1).max())
