"""Guidance: combines several predictions of the clean sample into one.

x = positive + (cfg - 1)(positive - negative) + stg (positive - perturbed) + (modality - 1)(positive - isolated),
then rescaled towards the positive prediction's standard deviation. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Guidance scales. A cfg or modality_scale of 1 or an stg_scale of 0 switches its term off.

    A term that is off for both modalities saves its forward pass.
    """

    video_cfg: float = 1.0
    audio_cfg: float = 1.0
    modality_scale: float = 1.0
    stg_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    rescale: float = 0.0

    @property
    def needs_negative(self) -> bool:
        return self.video_cfg != 1 or self.audio_cfg != 1

    @property
    def needs_perturbed(self) -> bool:
        return self.stg_scale != 0 and bool(self.stg_blocks)

    @property
    def needs_isolated(self) -> bool:
        return self.modality_scale != 1


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
        if other is not None:
            guided = guided + scale * (positive - other)
    if rescale and guided is not positive:
        ratio = positive.std() / guided.std().clamp_min(1e-8)
        guided = guided * (rescale * ratio + (1 - rescale))
    return guided
