"""Builds the transformer's inputs and training targets from a batch and a mode.

Owns the random draws, the noising and the loss mask. `given` selects the clean target tokens and `references` appends
reference tokens. For fixed draws the result is deterministic. The draws are keyed by sample, so they do not depend on
the other samples of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import (
    Batch,
    Condition,
    ConditionKind,
    Coupling,
    DataError,
    Modality,
    ModalityName,
    Mode,
    Role,
    Velocity,
)
from ltx_train.diffusion import given, positions, references
from ltx_train.diffusion.references import Reference
from ltx_train.diffusion.sigma import SigmaDistribution, levels

TokenWeights = Mapping[str, float]
_UNWEIGHTED: TokenWeights = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """All random numbers of one training step, on the CPU.

    Sigma (B,) per modality and noise in the shape of the target tokens, both float32. Per condition of the mode:
    `chosen` (B,) bool, whether a sample has it, and `numbers` (B, 4) float32 from U[0, 1) for its size and position.
    """

    video_sigma: Tensor
    audio_sigma: Tensor
    video_noise: Tensor | None
    audio_noise: Tensor | None
    chosen: tuple[Tensor, ...] = ()
    numbers: tuple[Tensor, ...] = ()

    def sigma(self, modality: ModalityName) -> Tensor:
        return self.video_sigma if modality is ModalityName.video else self.audio_sigma

    def noise(self, modality: ModalityName) -> Tensor | None:
        return self.video_noise if modality is ModalityName.video else self.audio_noise


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """The transformer's inputs and its target velocities. Absent modalities have neither, frozen ones no velocity."""

    video: Modality | None
    audio: Modality | None
    video_velocity: Velocity | None
    audio_velocity: Velocity | None


def draw(batch: Batch, mode: Mode, distribution: SigmaDistribution, seed: int, *, sigma: float | None = None) -> Draws:
    """Keyed random numbers for a batch. `sigma` replaces the drawn noise levels (held-out evaluation)."""
    video_tokens, audio_tokens = _token_counts(batch)
    # The shift of the noise levels depends on the number of generated tokens.
    shared_tokens = video_tokens if mode.video is Role.generate else audio_tokens
    pairs = list(zip(batch.keys, batch.draws, strict=True))
    if sigma is not None:
        video = audio = torch.full((len(pairs),), sigma)
    else:
        video = torch.cat([_level(distribution, rng.generator(seed, "sigma", k, d), shared_tokens) for k, d in pairs])
        audio = video
        if mode.sigma is Coupling.independent:
            audio = torch.cat(
                [_level(distribution, rng.generator(seed, "sigma/audio", k, d), audio_tokens) for k, d in pairs]
            )
    # Drawn for every sample, with or without the condition, so that changing p changes no other draw.
    chances = [torch.cat([rng.uniform(seed, c.name, k, d) for k, d in pairs]) for c in mode.conditions]
    numbers = [torch.stack([rng.uniform(seed, f"{c.name}/place", k, d, 4) for k, d in pairs]) for c in mode.conditions]
    return Draws(
        video_sigma=video, audio_sigma=audio,
        video_noise=_noise(batch, mode.video, "noise/video", seed, batch.video_latent),
        audio_noise=_noise(batch, mode.audio, "noise/audio", seed, batch.audio_latent),
        chosen=tuple(chance < c.p for chance, c in zip(chances, mode.conditions, strict=True)),
        numbers=tuple(numbers),
    )  # fmt: skip


def without_references(mode: Mode, draws: Draws) -> Draws:
    """The same draws with every reference dropped."""
    pairs = zip(mode.conditions, draws.chosen, strict=True)
    return replace(draws, chosen=tuple(d & (c.kind is not ConditionKind.reference) for c, d in pairs))


def assemble(batch: Batch, mode: Mode, draws: Draws, token_weights: TokenWeights = _UNWEIGHTED) -> ModelInputs:
    """The model's inputs on the batch's device. token_weights: loss weight of the tokens inside a mask, by mask name.

    DataError names samples without data that the mode needs, and samples whose tokens are all clean.
    """
    video, video_velocity = _stream(batch, mode, draws, ModalityName.video, token_weights)
    audio, audio_velocity = _stream(batch, mode, draws, ModalityName.audio, token_weights)
    masks = [v.loss_mask.amax(dim=1) > 0 for v in (video_velocity, audio_velocity) if v is not None]
    predicted = torch.stack(masks).any(dim=0).tolist() if masks else [False] * len(batch.keys)
    all_clean = [key for key, has_targets in zip(batch.keys, predicted, strict=True) if not has_targets]
    if all_clean:
        raise DataError(f"{', '.join(all_clean[:3])}: every token is given clean, there is nothing to predict")
    return ModelInputs(video, audio, video_velocity, audio_velocity)


def _stream(
    batch: Batch, mode: Mode, draws: Draws, name: ModalityName, token_weights: TokenWeights
) -> tuple[Modality | None, Velocity | None]:
    if mode.role(name) is Role.absent:
        return None, None
    latent = batch.video_latent if name is ModalityName.video else batch.audio_latent
    if latent is None:
        raise DataError(f"{', '.join(batch.keys[:3])}: the mode needs {name.value}, and there is none")
    grid = tuple(latent.shape[2:]) if name is ModalityName.video else (latent.shape[2],)
    noised = torch.ones(len(batch.keys), math.prod(grid), device=latent.device)
    attachments: list[Reference] = []
    for condition, chosen, numbers in zip(mode.conditions, draws.chosen, draws.numbers, strict=True):
        if condition.stream is not name:
            continue
        if condition.kind is ConditionKind.reference:
            visible = references.visible(condition, chosen, draws.sigma(name))
            attachments.append(Reference(condition, _required_tensor(batch, condition, batch.references), visible))
            continue
        mask = _required_tensor(batch, condition, batch.masks) if condition.kind is ConditionKind.mask else None
        clean = given.tokens(condition, grid, numbers, mask).to(latent.device)
        noised[clean & chosen[:, None].to(latent.device)] = 0
    modality, velocity = _noised(batch, latent, noised, sigma=draws.sigma(name), noise=draws.noise(name), name=name)
    if velocity is not None:
        velocity = replace(velocity, loss_mask=_weighted(batch, velocity.loss_mask, grid, token_weights))
    return references.attached(modality, attachments, latent, batch.fps), velocity


def _noised(
    batch: Batch, latent: Tensor, noised: Tensor, *, sigma: Tensor, noise: Tensor | None, name: ModalityName
) -> tuple[Modality, Velocity | None]:
    """x = (1 - sigma) * clean + sigma * noise where `noised` is 1. Without noise the modality stays clean."""
    clean, device = references.tokens(latent), latent.device
    if name is ModalityName.video:
        sizes = (latent.shape[2], latent.shape[3], latent.shape[4])
        bounds = torch.stack([positions.video(*sizes, float(fps)) for fps in batch.fps]).to(device)
        context = batch.video_context
    else:
        bounds = positions.audio(clean.shape[1]).expand(clean.shape[0], -1, -1, -1).to(device)
        context = batch.audio_context
    if noise is None:
        zeros = torch.zeros(clean.shape[0], device=device)
        return Modality(
            latent=clean, timesteps=torch.zeros_like(noised), sigma=zeros, positions=bounds, context=context
        ), None
    noise, level = noise.to(device), sigma.to(device)
    timesteps = level[:, None] * noised
    modality = Modality(
        latent=torch.lerp(clean, noise, timesteps[..., None]),
        timesteps=timesteps,
        sigma=level,
        positions=bounds,
        context=context,
    )
    return modality, Velocity(noise - clean, noised)


def _weighted(batch: Batch, mask: Tensor, grid: given.Grid, token_weights: TokenWeights) -> Tensor:
    """The loss mask times the weights of the data's masks. Masks of another grid belong to the other modality."""
    for name, weight in token_weights.items():
        weighted_tokens = batch.masks.get(name)
        if weighted_tokens is not None and tuple(weighted_tokens.shape[1:]) == grid:
            mask = mask * (1 + (weight - 1) * weighted_tokens.flatten(1).to(mask.device))
    return mask


def _required_tensor(batch: Batch, condition: Condition, tensors: Mapping[str, Tensor]) -> Tensor:
    key = condition.source if condition.kind is ConditionKind.mask else condition.name
    if key not in tensors:
        raise DataError(f"{', '.join(batch.keys[:3])}: the mode needs {condition.name}, and the data do not contain it")
    return tensors[key]


def _token_counts(batch: Batch) -> tuple[int, int]:
    video = 0 if batch.video_latent is None else batch.video_latent[0, 0].numel()
    return video, 0 if batch.audio_latent is None else batch.audio_latent.shape[2]


def _level(distribution: SigmaDistribution, stream: torch.Generator, tokens: int) -> Tensor:
    normal = torch.randn(1, generator=stream)
    flat, selector = torch.rand(2, generator=stream).split(1)
    return levels(normal, flat, selector, tokens, distribution)


def _noise(batch: Batch, role: Role, purpose: str, seed: int, latent: Tensor | None) -> Tensor | None:
    """Noise in token layout (B, T, C), or None for a modality that is not generated."""
    if role is not Role.generate or latent is None:
        return None
    channels = latent.shape[1] if latent.ndim == 5 else latent.shape[1] * latent.shape[3]
    tokens = latent[0, 0].numel() if latent.ndim == 5 else latent.shape[2]
    pairs = zip(batch.keys, batch.draws, strict=True)
    return torch.stack([rng.normal((tokens, channels), seed, purpose, key, step) for key, step in pairs])
