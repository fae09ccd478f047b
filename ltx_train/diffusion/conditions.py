"""From a batch and a mode to what the transformer reads and what it must predict.

Owns noising, clean tokens, references, masks and timesteps. Pure given its draws; the draws are
keyed by sample, so they do not depend on the batch a sample happens to be in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import Batch, ConditionKind, Coupling, Levels, Modality, Mode, Placement, Role, Velocity
from ltx_train.diffusion import positions
from ltx_train.diffusion.sigma import SigmaDistribution, shifted_logit_normal


@dataclass(frozen=True, slots=True)
class Draws:
    """Everything random in one training step, float32 on the CPU: sigma (B,) per modality, noise like the target
    tokens, and which samples have a clean first frame (B,) bool."""

    video_sigma: Tensor
    audio_sigma: Tensor
    video_noise: Tensor | None
    audio_noise: Tensor | None
    first_frame: Tensor


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What goes into the transformer and the velocities it has to give; None for an absent or given modality."""

    video: Modality | None
    audio: Modality | None
    video_velocity: Velocity | None
    audio_velocity: Velocity | None


def draw(batch: Batch, mode: Mode, distribution: SigmaDistribution, seed: int, *, sigma: float | None = None) -> Draws:
    """Keyed random numbers for a batch; a given `sigma` replaces the drawn levels (held-out evaluation)."""
    video_tokens, audio_tokens = _token_counts(batch)
    shared_tokens = video_tokens if mode.video is Role.generate else audio_tokens
    own = mode.sigma is Coupling.independent
    first = mode.condition(ConditionKind.first_frame)
    levels: list[tuple[Tensor, Tensor]] = []
    for key, step in zip(batch.keys, batch.draws, strict=True):
        shared = _level(distribution, seed, "sigma", key, step, shared_tokens)
        audio = _level(distribution, seed, "sigma/audio", key, step, audio_tokens) if own else shared
        levels.append((shared, audio))
    chance = [rng.uniform(seed, "first_frame", k, d) for k, d in zip(batch.keys, batch.draws, strict=True)]
    fixed = None if sigma is None else torch.full((len(batch.keys),), sigma)
    return Draws(
        video_sigma=torch.cat([v for v, _ in levels]) if fixed is None else fixed,
        audio_sigma=torch.cat([a for _, a in levels]) if fixed is None else fixed,
        video_noise=_noise(batch, mode.video, "noise/video", seed, batch.video_latent),
        audio_noise=_noise(batch, mode.audio, "noise/audio", seed, batch.audio_latent),
        first_frame=torch.cat(chance) < (first.p if first else 0.0),
    )


def assemble(batch: Batch, mode: Mode, draws: Draws) -> ModelInputs:
    """The model's inputs on the batch's device. ValueError when nothing is left to predict."""
    video = _video(batch, mode, draws)
    audio = _audio(batch, mode, draws)
    velocities = [part[1] for part in (video, audio) if part is not None and part[1] is not None]
    if not any(bool(velocity.loss_mask.any()) for velocity in velocities):
        raise ValueError("every token is given clean: there is nothing to predict")
    return ModelInputs(
        video=video[0] if video else None,
        audio=audio[0] if audio else None,
        video_velocity=video[1] if video else None,
        audio_velocity=audio[1] if audio else None,
    )


def distinct(timesteps: Tensor) -> Levels:
    """The distinct timesteps of (B, T), padded to one level per sample and the clean one: compiled graphs
    then see one shape. Looking for them costs a GPU a stall, so call it on the CPU."""
    values, index = torch.unique(timesteps.float(), return_inverse=True)
    missing = timesteps.shape[0] + 1 - values.numel()
    return Levels(torch.cat([values, values[-1:].expand(max(0, missing))]), index)


def to_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """Everything on `device` except timesteps, which go there as distinct levels."""
    return ModelInputs(
        video=_moved(inputs.video, device),
        audio=_moved(inputs.audio, device),
        video_velocity=_moved_velocity(inputs.video_velocity, device),
        audio_velocity=_moved_velocity(inputs.audio_velocity, device),
    )


def _moved(modality: Modality | None, device: torch.device) -> Modality | None:
    if modality is None:
        return None
    names = ("latent", "sigma", "positions", "context", "context_mask", "attention_mask")
    tensors: dict[str, Tensor | None] = {name: getattr(modality, name) for name in names}
    levels = distinct(modality.timesteps)
    sent = Levels(_sent(levels.values, device), _sent(levels.index, device))
    return replace(modality, levels=sent, **{k: _sent(t, device) for k, t in tensors.items() if t is not None})


def _moved_velocity(velocity: Velocity | None, device: torch.device) -> Velocity | None:
    if velocity is None:
        return None
    return Velocity(_sent(velocity.target, device), _sent(velocity.loss_mask, device))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory when it goes to a GPU: only then does the copy run beside the computation."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _video(batch: Batch, mode: Mode, draws: Draws) -> tuple[Modality, Velocity | None] | None:
    if mode.video is Role.absent or batch.video_latent is None:
        return None
    latent = batch.video_latent.float()
    frames, height, width = latent.shape[2:]
    clean = latent.flatten(2).transpose(1, 2)
    bounds = torch.stack([positions.video(frames, height, width, float(fps)) for fps in batch.fps])
    noised = torch.ones(clean.shape[:2], device=clean.device)
    noised[draws.first_frame.to(clean.device), : height * width] = 0
    return _noise_tokens(
        clean, noised, draws.video_sigma, draws.video_noise, bounds.to(clean.device), batch.video_context
    )


def _audio(batch: Batch, mode: Mode, draws: Draws) -> tuple[Modality, Velocity | None] | None:
    if mode.audio is Role.absent or batch.audio_latent is None:
        return None
    clean = _audio_tokens(batch.audio_latent)
    bounds = positions.audio(clean.shape[1]).expand(clean.shape[0], -1, -1, -1).to(clean.device)
    noised = torch.ones(clean.shape[:2], device=clean.device)
    modality, velocity = _noise_tokens(clean, noised, draws.audio_sigma, draws.audio_noise, bounds, batch.audio_context)
    reference = mode.condition(ConditionKind.reference)
    if reference is not None and batch.reference_audio is not None:
        modality = _with_reference(modality, _audio_tokens(batch.reference_audio), reference.position, reference.gap_s)
    return modality, velocity


def _noise_tokens(
    clean: Tensor, noised: Tensor, sigma: Tensor, noise: Tensor | None, bounds: Tensor, context: Tensor
) -> tuple[Modality, Velocity | None]:
    """x = (1 - sigma) * clean + sigma * noise where `noised` is 1; a modality without noise is given as it is."""
    level = sigma.to(clean.device) if noise is not None else torch.zeros(clean.shape[0], device=clean.device)
    if noise is None:
        return Modality(clean, torch.zeros_like(noised), level, bounds, context), None
    noise = noise.to(clean.device)
    timesteps = level[:, None] * noised
    latent = torch.lerp(clean, noise, timesteps[..., None])
    return Modality(latent, timesteps, level, bounds, context), Velocity(noise - clean, noised)


def _with_reference(modality: Modality, tokens: Tensor, placement: Placement, gap_s: float) -> Modality:
    """Appends clean tokens: timestep 0, no loss, behind the target (the order has no influence)."""
    count = tokens.shape[1]
    bounds = positions.audio(count) if placement is Placement.overlap else positions.negative_audio(count, gap_s)
    bounds = bounds.expand(tokens.shape[0], -1, -1, -1).to(tokens.device)
    clean = torch.zeros(tokens.shape[:2], device=tokens.device)
    return Modality(
        latent=torch.cat([modality.latent, tokens], dim=1),
        timesteps=torch.cat([modality.timesteps, clean], dim=1),
        sigma=modality.sigma,
        positions=torch.cat([modality.positions, bounds], dim=2),
        context=modality.context,
    )


def _audio_tokens(latent: Tensor) -> Tensor:
    return latent.float().transpose(1, 2).flatten(2)


def _token_counts(batch: Batch) -> tuple[int, int]:
    video = 0 if batch.video_latent is None else batch.video_latent[0, 0].numel()
    return video, 0 if batch.audio_latent is None else batch.audio_latent.shape[2]


def _level(distribution: SigmaDistribution, seed: int, purpose: str, key: str, step: int, tokens: int) -> Tensor:
    stream = rng.generator(seed, purpose, key, step)
    normal = torch.randn(1, generator=stream)
    flat, selector = torch.rand(2, generator=stream).split(1)
    return shifted_logit_normal(normal, flat, selector, tokens, distribution)


def _noise(batch: Batch, role: Role, purpose: str, seed: int, latent: Tensor | None) -> Tensor | None:
    """Noise in token layout (B, T, C), or None for a modality that is not generated."""
    if role is not Role.generate or latent is None:
        return None
    channels = latent.shape[1] if latent.ndim == 5 else latent.shape[1] * latent.shape[3]
    tokens = latent[0, 0].numel() if latent.ndim == 5 else latent.shape[2]
    pairs = zip(batch.keys, batch.draws, strict=True)
    return torch.stack([rng.normal((tokens, channels), seed, purpose, key, step) for key, step in pairs])
