"""The Euler loop over the reference schedule, for one or both modalities at once.

Owns the update of noised tokens; given tokens (first frame, references, a frozen modality) stay
as they are. Noise, contexts and decoding are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_train.contracts import Modality, ModalityName
from ltx_train.diffusion.references import Gate, closed
from ltx_train.model.transformer import UNPERTURBED, Pair, Perturbation, Transformer
from ltx_train.sampling.guidance import Guidance, combine


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInputs:
    """Both modalities at sigma 1: noised tokens hold noise and timestep 1, given tokens their values and timestep 0.

    negative_*: contexts of the negative prompt, (1, S, D), when guidance needs them. gates: references that are there
    at some noise levels only.
    """

    video: Modality | None
    audio: Modality | None
    negative_video: Tensor | None = None
    negative_audio: Tensor | None = None
    gates: tuple[Gate, ...] = ()


@torch.no_grad()
def sample(transformer: Transformer, start: SamplerInputs, sigmas: Tensor, guidance: Guidance) -> Pair:
    """Clean tokens (B, T, C) of both modalities, references included; None for an absent one.

    sigmas: steps + 1 levels from 1 to 0.
    """
    masks = [None if m is None else m.timesteps for m in (start.video, start.audio)]
    video, audio = start.video, start.audio
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        now = [
            _at(m, mask, sigma, name, start.gates)
            for m, mask, name in zip((video, audio), masks, ModalityName, strict=True)
        ]
        clean = _guided(transformer, now[0], now[1], start, guidance)
        video, audio = (
            _stepped(begun, m, x, mask, sigma=sigma, following=following)
            for begun, m, x, mask in zip((start.video, start.audio), now, clean, masks, strict=True)
        )
    return (None if video is None else video.latent), (None if audio is None else audio.latent)


def _at(
    modality: Modality | None, mask: Tensor | None, sigma: float, name: ModalityName, gates: Sequence[Gate]
) -> Modality | None:
    """The modality with timesteps and sigma of this step; a fully given one keeps sigma 0."""
    if modality is None or mask is None:
        return None
    level = mask.amax(dim=1) * sigma
    return closed(replace(modality, timesteps=mask * sigma, sigma=level), name, gates, sigma)


def _stepped(
    begun: Modality | None, modality: Modality | None, clean: Tensor | None, mask: Tensor | None, *,
    sigma: float, following: float,
) -> Modality | None:  # fmt: skip
    """The next step's tokens in what the sampling began with: masks of this step's noise level are left behind."""
    if modality is None or clean is None or mask is None or begun is None:
        return None
    velocity = (modality.latent - clean) / sigma
    return replace(begun, latent=modality.latent + (following - sigma) * velocity * mask[..., None])


def _guided(
    transformer: Transformer, video: Modality | None, audio: Modality | None, start: SamplerInputs, g: Guidance
) -> Pair:
    """The guided prediction of the clean tokens."""
    skipped = Perturbation(skip_self_attention=frozenset(g.stg_blocks))
    isolated = Perturbation(isolate_modalities=True)
    other_video = _with_context(video, start.negative_video)
    other_audio = _with_context(audio, start.negative_audio)
    arms: list[Pair] = [
        _clean(transformer, video, audio, UNPERTURBED),
        _clean(transformer, other_video, other_audio, UNPERTURBED) if g.needs_negative else (None, None),
        _clean(transformer, video, audio, skipped) if g.needs_perturbed else (None, None),
        _clean(transformer, video, audio, isolated) if g.needs_isolated and video and audio else (None, None),
    ]
    return _combined((arm[0] for arm in arms), g.video_cfg, g), _combined((arm[1] for arm in arms), g.audio_cfg, g)


def _combined(predictions: Iterable[Tensor | None], cfg: float, g: Guidance) -> Tensor | None:
    positive, negative, perturbed, isolated = predictions
    if positive is None:
        return None
    return combine(
        positive, negative, perturbed, isolated,
        cfg=cfg, stg=g.stg_scale, modality=g.modality_scale, rescale=g.rescale,
    )  # fmt: skip


def _clean(transformer: Transformer, video: Modality | None, audio: Modality | None, what: Perturbation) -> Pair:
    """x0 = x - timestep * velocity, per token."""
    velocities = transformer(video, audio, what)
    pairs = zip((video, audio), velocities, strict=True)
    first, second = (
        None if m is None or v is None else m.latent.float() - m.timesteps[..., None] * v.float() for m, v in pairs
    )
    return first, second


def _with_context(modality: Modality | None, context: Tensor | None) -> Modality | None:
    return modality if modality is None or context is None else replace(modality, context=context)
