"""The Euler loop over the reference schedule, for one modality or both at once.

Owns the update of noised tokens; condition tokens (first frame, references, a frozen modality) keep
their values. The caller provides noise and contexts, and decodes the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_train import terminal
from ltx_train.contracts import Modality, ModalityName
from ltx_train.diffusion.references import Gate, closed
from ltx_train.model.transformer import UNPERTURBED, Pair, Perturbation, Transformer
from ltx_train.sampling.guidance import Guidance, combine


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInputs:
    """Both modalities at sigma 1: noised tokens hold noise at timestep 1, condition tokens their values at timestep 0.

    negative_*: contexts of the negative prompt, (1, S, D), if guidance needs them. gates: references that are visible
    only within a range of noise levels.
    """

    video: Modality | None
    audio: Modality | None
    negative_video: Tensor | None = None
    negative_audio: Tensor | None = None
    gates: tuple[Gate, ...] = ()


@torch.no_grad()
def sample(transformer: Transformer, start: SamplerInputs, sigmas: Tensor, guidance: Guidance) -> Pair:
    """Clean tokens (B, T, C) of both modalities, references included; None for an absent one.

    sigmas: steps + 1 noise levels from 1 to 0.
    """
    masks = [None if m is None else m.timesteps for m in (start.video, start.audio)]
    video, audio = start.video, start.audio
    levels = list(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True))
    with terminal.counted("denoising", len(levels)) as advance:
        for sigma, next_sigma in levels:
            current = [
                _at_level(m, mask, sigma, name, start.gates)
                for m, mask, name in zip((video, audio), masks, ModalityName, strict=True)
            ]
            clean = _guided(transformer, current[0], current[1], start, guidance)
            video, audio = (
                _euler_step(initial, m, x, mask, sigma=sigma, next_sigma=next_sigma)
                for initial, m, x, mask in zip((start.video, start.audio), current, clean, masks, strict=True)
            )
            advance()
    return (None if video is None else video.latent), (None if audio is None else audio.latent)


def _at_level(
    modality: Modality | None, mask: Tensor | None, sigma: float, name: ModalityName, gates: Sequence[Gate]
) -> Modality | None:
    """The modality with the timesteps and sigma of this step; one without noised tokens keeps sigma 0."""
    if modality is None or mask is None:
        return None
    level = mask.amax(dim=1) * sigma
    return closed(replace(modality, timesteps=mask * sigma, sigma=level), name, gates, sigma)


def _euler_step(
    initial: Modality | None, modality: Modality | None, clean: Tensor | None, mask: Tensor | None, *,
    sigma: float, next_sigma: float,
) -> Modality | None:  # fmt: skip
    """`initial` with the tokens after one Euler step from sigma to next_sigma.

    Starts from `initial` because the attention masks of `modality` hold for this noise level only.
    """
    if modality is None or clean is None or mask is None or initial is None:
        return None
    velocity = (modality.latent - clean) / sigma
    return replace(initial, latent=modality.latent + (next_sigma - sigma) * velocity * mask[..., None])


def _guided(
    transformer: Transformer, video: Modality | None, audio: Modality | None, start: SamplerInputs, g: Guidance
) -> Pair:
    """The guided prediction of the clean tokens of both modalities."""
    skipped = Perturbation(skip_self_attention=frozenset(g.stg_blocks))
    isolated = Perturbation(isolate_modalities=True)
    negative_video = _with_context(video, start.negative_video)
    negative_audio = _with_context(audio, start.negative_audio)
    arms: list[Pair] = [
        _clean(transformer, video, audio, UNPERTURBED),
        _clean(transformer, negative_video, negative_audio, UNPERTURBED) if g.needs_negative else (None, None),
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


def _clean(
    transformer: Transformer, video: Modality | None, audio: Modality | None, perturbation: Perturbation
) -> Pair:
    """Predicted clean tokens: x0 = x - timestep * velocity, per token."""
    velocities = transformer(video, audio, perturbation)
    pairs = zip((video, audio), velocities, strict=True)
    first, second = (
        None if m is None or v is None else m.latent.float() - m.timesteps[..., None] * v.float() for m, v in pairs
    )
    return first, second


def _with_context(modality: Modality | None, context: Tensor | None) -> Modality | None:
    return modality if modality is None or context is None else replace(modality, context=context)
