"""Collates samples of one bucket into a batch by stacking their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ltx_train.contracts import Batch, DataError, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples into a batch. DataError when shapes differ or only some of the samples have a tensor."""
    return Batch(
        keys=tuple(s.key for s in samples),
        speakers=tuple(s.speaker for s in samples),
        draws=tuple(s.draw for s in samples),
        fps=torch.tensor([s.fps for s in samples], dtype=torch.float32),
        video_latent=_stack("video_latent", samples, [s.video_latent for s in samples]),
        audio_latent=_stack("audio_latent", samples, [s.audio_latent for s in samples]),
        video_context=torch.stack([s.video_context for s in samples]),
        audio_context=torch.stack([s.audio_context for s in samples]),
        references=_stack_named(samples, [s.references for s in samples]),
        masks=_stack_named(samples, [s.masks for s in samples]),
    )


def _stack_named(samples: Sequence[Sample], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    stacks = {name: _stack(name, samples, [p.get(name) for p in parts]) for p in parts for name in p}
    return {name: stack for name, stack in stacks.items() if stack is not None}


def _stack(name: str, samples: Sequence[Sample], parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if len(present) != len(parts) or len({p.shape for p in present}) != 1:
        described = ", ".join(
            f"{s.key}: {'none' if p is None else list(p.shape)}" for s, p in zip(samples, parts, strict=True)
        )
        raise DataError(f"cannot stack the {name} of a batch ({described}); set optim.batch_size=1 or fix the clips")
    return torch.stack(present)
