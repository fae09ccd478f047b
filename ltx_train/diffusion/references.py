"""Reference tokens: where they stand, and who may see them.

Owns positions, visibility and strengths of clean tokens beside the target. Which clip they come
from is the data's matter; whether a sample has them is drawn in `conditions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_train.contracts import Batch, Condition, DataError, Modality, ModalityName, Mode, Placement
from ltx_train.diffusion import positions


@dataclass(frozen=True, slots=True)
class Reference:
    """One condition's tokens in a batch: latent (B, C, F, H, W) or (B, c, R, f); visible (B,) bool."""

    condition: Condition
    latent: Tensor
    visible: Tensor


def visible(condition: Condition, chosen: Tensor, sigma: Tensor) -> Tensor:
    """(B,) bool: where it was drawn and the noise level lies within the condition's gate."""
    low, high = condition.sigmas
    return chosen & (sigma >= low) & (sigma <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Tokens [first, last) of a modality that are there at noise levels in [low, high] only."""

    modality: ModalityName
    first: int
    last: int
    low: float
    high: float


def gates(mode: Mode, batch: Batch) -> tuple[Gate, ...]:
    """The gates of a batch's references, for sampling, where the noise level changes under one set of tokens."""
    found: list[Gate] = []
    for name in ModalityName:
        latent = batch.video_latent if name is ModalityName.video else batch.audio_latent
        place = 0 if latent is None else tokens(latent[:1]).shape[1]
        for condition in (c for c in mode.references if c.stream is name and c.name in batch.references):
            count = tokens(batch.references[condition.name][:1]).shape[1]
            low, high = condition.sigmas
            found.append(Gate(modality=name, first=place, last=place + count, low=low, high=high))
            place += count
    return tuple(gate for gate in found if (gate.low, gate.high) != (0.0, 1.0))


def always_open(mode: Mode) -> Mode:
    """The mode whose references are always there, at every noise level."""
    opened = [replace(c, p=1.0, sigmas=[0.0, 1.0]) if c in mode.references else c for c in mode.conditions]
    return replace(mode, conditions=opened)


def closed(modality: Modality, name: ModalityName, found: Sequence[Gate], sigma: float) -> Modality:
    """The modality with the tokens hidden whose gate is closed at a noise level."""
    hidden = [g for g in found if g.modality is name and not g.low <= sigma <= g.high]
    if not hidden:
        return modality
    shown = torch.ones(modality.latent.shape[:2], device=modality.latent.device)
    for gate in hidden:
        shown[:, gate.first : gate.last] = 0
    own, cross = modality.attention_mask, modality.cross_mask
    own, cross = (shown if mask is None else mask * shown for mask in (own, cross))
    return replace(modality, attention_mask=own, cross_mask=cross)


def attached(modality: Modality, references: Sequence[Reference], target: Tensor, fps: Tensor) -> Modality:
    """Appends clean tokens behind the target's: timestep 0, no loss; the order has no influence.

    target: the target's latent, for the scale between both grids; fps (B,). A reference that no sample of the
    batch sees is left out; one that some see is hidden from the others by its weight as a key.
    """
    for reference in references:
        if bool(reference.visible.any()):
            modality = _appended(modality, reference, target, fps)
    return modality


def bounds(condition: Condition, latent: Tensor, target: Tensor, fps: Tensor) -> Tensor:
    """(B, n, R, 2) float32: [start, end) of the reference's tokens on the target's axes."""
    if condition.stream is ModalityName.audio:
        found = positions.audio(latent.shape[2]).expand(latent.shape[0], -1, -1, -1).clone()
    else:
        scale = condition.spatial_scale or spatial_scale(latent, target)
        sizes = (latent.shape[2], latent.shape[3], latent.shape[4])
        made = [
            positions.video_reference(*sizes, float(f), spatial_scale=scale, temporal_scale=condition.temporal_scale)
            for f in fps
        ]
        found = torch.stack(made)
    if condition.position is Placement.negative:
        found[:, 0] -= found[:, 0, -1:, 1:] + condition.gap_s
    return found


def spatial_scale(latent: Tensor, target: Tensor) -> int:
    """How many times smaller the reference's grid is than the target's; DataError unless it is a whole number."""
    scales = {wide / narrow for wide, narrow in zip(target.shape[3:], latent.shape[3:], strict=True)}
    scale = scales.pop()
    if scales or scale != int(scale):
        raise DataError(
            f"a reference of {list(latent.shape[3:])} latents beside a target of {list(target.shape[3:])}: the target "
            "must be a whole number of times as large, or the condition needs its spatial_scale"
        )
    return int(scale)


def tokens(latent: Tensor) -> Tensor:
    """Latents (B, C, F, H, W) or (B, c, T, f) to tokens (B, T, C) float32."""
    if latent.ndim == 5:
        return latent.float().flatten(2).transpose(1, 2)
    return latent.float().transpose(1, 2).flatten(2)


def _appended(modality: Modality, reference: Reference, target: Tensor, fps: Tensor) -> Modality:
    condition, clean = reference.condition, tokens(reference.latent)
    count, device = clean.shape[1], clean.device
    places = bounds(condition, reference.latent, target, fps).to(device)
    seen = reference.visible.float().to(device)
    return replace(
        modality,
        latent=torch.cat([modality.latent, clean], dim=1),
        timesteps=torch.cat([modality.timesteps, torch.zeros(clean.shape[:2], device=device)], dim=1),
        positions=torch.cat([modality.positions, places], dim=2),
        attention_mask=_extended(modality.attention_mask, modality, count, seen * condition.strength),
        cross_mask=_extended(modality.cross_mask, modality, count, seen * condition.strength * condition.crossed),
        reads_text=_extended(modality.reads_text, modality, count, torch.ones_like(seen) * condition.reads_text),
    )


def _extended(weights: Tensor | None, before: Modality, count: int, value: Tensor) -> Tensor | None:
    """(B, T + count) with `value` (B,) for the new tokens; None while everything is 1, which is the fast path."""
    if weights is None and bool((value == 1).all()):
        return None
    if weights is None:
        weights = torch.ones(before.latent.shape[:2], device=value.device)
    return torch.cat([weights, value[:, None].expand(-1, count)], dim=1)
