"""The loop over noise levels, by Euler or Heun steps, for one modality or both at once.

Owns the update of noised tokens; condition tokens (first frame, references, a frozen modality) keep
their values. The caller provides noise and contexts, and decodes the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from ltx_train import terminal
from ltx_train.contracts import Modality, ModalityName
from ltx_train.diffusion.references import Gate, closed
from ltx_train.model.transformer import UNPERTURBED, Pair, Perturbation, Transformer
from ltx_train.sampling.guidance import NEUTRAL, Guidance, guided

_State = tuple[Modality | None, Modality | None]


class Solver(StrEnum):
    """euler: one prediction a step; heun: two, of second order."""

    euler = "euler"
    heun = "heun"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInputs:
    """Both modalities at the first noise level. Noised tokens have timestep 1 at any level, and condition tokens their
    values at timestep 0.

    negative_*: contexts of the negative prompt, (1, S, D), if guidance needs them. gates: references that are visible
    only within a range of noise levels.
    """

    video: Modality | None
    audio: Modality | None
    negative_video: Tensor | None = None
    negative_audio: Tensor | None = None
    gates: tuple[Gate, ...] = ()


@torch.no_grad()
def sample(
    transformer: Transformer, start: SamplerInputs, sigmas: Tensor, guidance: Guidance, solver: Solver = Solver.euler
) -> Pair:
    """Clean tokens (B, T, C) of both modalities, references included; None for an absent one.

    sigmas: steps + 1 noise levels, from the one that the tokens have to 0.
    """
    loop = _Loop(transformer, start, _neutral_where_frozen(start, guidance))
    state: _State = (start.video, start.audio)
    levels = list(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True))
    clean: Pair = (None, None)
    with terminal.counted("denoising", len(levels)) as advance:
        for number, (sigma, lower) in enumerate(levels):
            if number % (guidance.skip + 1) == 0:
                clean = loop.predicted(state, sigma)
            following = loop.moved(state, clean, sigma, lower)
            if solver is Solver.heun and lower > 0 and guidance.skip == 0:
                ahead = loop.predicted(following, lower)
                following = loop.corrected(state, clean, following, ahead, (sigma, lower))
            state = following
            advance()
    video, audio = state
    return (None if video is None else video.latent), (None if audio is None else audio.latent)


@dataclass(frozen=True, slots=True)
class _Loop:
    """The steps of one generation. start: also the state that tokens given clean keep."""

    transformer: Transformer
    start: SamplerInputs
    guidance: Guidance

    def predicted(self, state: _State, sigma: float) -> Pair:
        """The guided clean tokens at a noise level."""
        current = [
            _at_level(m, mask, sigma, name, self.start.gates)
            for m, mask, name in zip(state, self._masks, ModalityName, strict=True)
        ]
        return _guided(self.transformer, current[0], current[1], self.start, self.guidance)

    def moved(self, state: _State, clean: Pair, sigma: float, lower: float) -> _State:
        """One Euler step along the velocity (x - clean) / sigma."""
        return self._stepped(
            state, [self._velocity(m, c, sigma) for m, c in zip(state, clean, strict=True)], lower - sigma
        )

    def corrected(
        self, state: _State, clean: Pair, following: _State, ahead: Pair, levels: tuple[float, float]
    ) -> _State:
        """Heun's step: along the mean of the velocities at both ends."""
        velocities: list[Tensor | None] = []
        for m, c, after, end in zip(state, clean, following, ahead, strict=True):
            first, second = self._velocity(m, c, levels[0]), self._velocity(after, end, levels[1])
            velocities.append(None if first is None or second is None else (first + second) / 2)
        return self._stepped(state, velocities, levels[1] - levels[0])

    @property
    def _masks(self) -> list[Tensor | None]:
        return [None if m is None else m.timesteps for m in (self.start.video, self.start.audio)]

    @staticmethod
    def _velocity(modality: Modality | None, clean: Tensor | None, sigma: float) -> Tensor | None:
        return None if modality is None or clean is None else (modality.latent - clean) / sigma

    def _stepped(self, state: _State, velocities: Sequence[Tensor | None], by: float) -> _State:
        video, audio = (
            None if m is None or v is None or mask is None else replace(m, latent=m.latent + by * v * mask[..., None])
            for m, v, mask in zip(state, velocities, self._masks, strict=True)
        )
        return video, audio


def _neutral_where_frozen(start: SamplerInputs, guidance: Guidance) -> Guidance:
    """A modality without noised tokens is not guided, and so it also keeps its own context in the negative pass."""
    frozen = [m is None or not bool(m.timesteps.any()) for m in (start.video, start.audio)]
    video, audio = (NEUTRAL if f else g for f, g in zip(frozen, (guidance.video, guidance.audio), strict=True))
    return replace(guidance, video=video, audio=audio)


def _at_level(
    modality: Modality | None, mask: Tensor | None, sigma: float, name: ModalityName, gates: Sequence[Gate]
) -> Modality | None:
    """The modality with the timesteps and sigma of this step; one without noised tokens keeps sigma 0."""
    if modality is None or mask is None:
        return None
    level = mask.amax(dim=1) * sigma
    return closed(replace(modality, timesteps=mask * sigma, sigma=level), name, gates, sigma)


def _guided(
    transformer: Transformer, video: Modality | None, audio: Modality | None, start: SamplerInputs, g: Guidance
) -> Pair:
    """The guided prediction of the clean tokens of both modalities."""
    skipped = Perturbation(
        skip_video=frozenset(g.video.blocks if g.video.perturbs else ()),
        skip_audio=frozenset(g.audio.blocks if g.audio.perturbs else ()),
    )
    isolated = Perturbation(isolate_modalities=True)
    negative_video = _with_context(video, start.negative_video if g.video.cfg != 1 else None)
    negative_audio = _with_context(audio, start.negative_audio if g.audio.cfg != 1 else None)
    arms: list[Pair] = [
        _clean(transformer, video, audio, UNPERTURBED),
        _clean(transformer, negative_video, negative_audio, UNPERTURBED) if g.needs_negative else (None, None),
        _clean(transformer, video, audio, skipped) if g.needs_perturbed else (None, None),
        _clean(transformer, video, audio, isolated) if g.needs_isolated and video and audio else (None, None),
    ]
    return guided([arm[0] for arm in arms], g.video), guided([arm[1] for arm in arms], g.audio)


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
