"""Guidance: combines several predictions of the clean sample into one.

x = positive + (cfg - 1)(positive - negative) + stg (positive - perturbed) + (modality - 1)(positive - isolated),
then rescaled towards the positive prediction's standard deviation. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Guider:
    """Guidance of one modality. A cfg or modality of 1 or an stg of 0 switches its term off. blocks: those whose
    self-attention spatio-temporal guidance (stg) skips."""

    cfg: float = 1.0
    stg: float = 0.0
    blocks: tuple[int, ...] = ()
    modality: float = 1.0
    rescale: float = 0.0

    @property
    def perturbs(self) -> bool:
        return self.stg != 0 and bool(self.blocks)


NEUTRAL = Guider()


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Guidance of both modalities. That of a frozen one is neutral. A term that is off for both saves its forward pass.

    skip: after each step with the model this many steps repeat its prediction.
    """

    video: Guider = NEUTRAL
    audio: Guider = NEUTRAL
    skip: int = 0

    @property
    def needs_negative(self) -> bool:
        return self.video.cfg != 1 or self.audio.cfg != 1

    @property
    def needs_perturbed(self) -> bool:
        return self.video.perturbs or self.audio.perturbs

    @property
    def needs_isolated(self) -> bool:
        return self.video.modality != 1 or self.audio.modality != 1


def guided(predictions: Sequence[Tensor | None], g: Guider) -> Tensor | None:
    """The guided prediction (B, T, C) from the positive, negative, perturbed and isolated one; None of a modality that
    is absent."""
    positive, negative, perturbed, isolated = predictions
    if positive is None:
        return None
    stg = g.stg if g.perturbs else 0.0
    return combine(positive, negative, perturbed, isolated, cfg=g.cfg, stg=stg, modality=g.modality, rescale=g.rescale)


def combine(
    positive: Tensor,
    negative: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    *,
    cfg: float,
    stg: float,
    modality: float,
    rescale: float,
) -> Tensor:
    """The guided prediction (B, T, C) from predictions of the same shape; None leaves out a prediction's term."""
    guided = positive
    for other, scale in ((negative, cfg - 1), (perturbed, stg), (isolated, modality - 1)):
        if other is not None and scale:
            guided = guided + scale * (positive - other)
    if rescale and guided is not positive:
        # Of each sample by itself, so that a batch gives what its samples give one by one.
        ratio = positive.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True).clamp_min(1e-8)
        guided = guided * (rescale * ratio + (1 - rescale))
    return guided
