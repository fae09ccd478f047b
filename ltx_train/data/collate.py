"""Samples of one bucket to a batch: stacking and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltx_train.contracts import Batch, DataError, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """DataError when samples do not stack (another shape, or a part that only some have)."""
    return Batch(
        keys=tuple(s.key for s in samples),
        speakers=tuple(s.speaker for s in samples),
        draws=tuple(s.draw for s in samples),
        fps=torch.tensor([s.fps for s in samples], dtype=torch.float32),
        video_latent=_stack(samples, "video_latent"),
        audio_latent=_stack(samples, "audio_latent"),
        video_context=torch.stack([s.video_context for s in samples]),
        audio_context=torch.stack([s.audio_context for s in samples]),
        reference_audio=_stack(samples, "reference_audio"),
    )


def _stack(samples: Sequence[Sample], name: str) -> Tensor | None:
    parts: list[Tensor | None] = [getattr(s, name) for s in samples]
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if len(present) != len(parts) or len({p.shape for p in present}) != 1:
        described = ", ".join(
            f"{s.key}: {'none' if p is None else list(p.shape)}" for s, p in zip(samples, parts, strict=True)
        )
        raise DataError(f"the {name} of a batch do not stack ({described}); set optim.batch_size=1 or fix the clips")
    return torch.stack(present)
