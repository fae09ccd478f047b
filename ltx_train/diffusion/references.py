"""Reference tokens: their positions, and which queries attend to them.

Owns positions, visibility and strengths of the clean tokens appended to the target. The data pipeline selects the
reference clip, and `conditions` draws whether a sample has a reference.
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
    """The reference of one condition in a batch: latent (B, C, F, H, W) or (B, c, R, f); visible (B,) bool."""

    condition: Condition
    latent: Tensor
    visible: Tensor


def visible(condition: Condition, chosen: Tensor, sigma: Tensor) -> Tensor:
    """(B,) bool: whether a sample has the reference and its noise level lies within the condition's `sigmas`."""
    low, high = condition.sigmas
    return chosen & (sigma >= low) & (sigma <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Tokens [first, last) of a modality that are visible only at noise levels in [low, high]."""

    modality: ModalityName
    first: int
    last: int
    low: float
    high: float


def gates(mode: Mode, batch: Batch) -> tuple[Gate, ...]:
    """The gates of a batch's references, for sampling, where the tokens stay the same while the noise level changes."""
    all_gates: list[Gate] = []
    for name in ModalityName:
        latent = batch.video_latent if name is ModalityName.video else batch.audio_latent
        first = 0 if latent is None else tokens(latent[:1]).shape[1]
        for condition in (c for c in mode.references if c.stream is name and c.name in batch.references):
            count = tokens(batch.references[condition.name][:1]).shape[1]
            low, high = condition.sigmas
            all_gates.append(Gate(modality=name, first=first, last=first + count, low=low, high=high))
            first += count
    return tuple(gate for gate in all_gates if (gate.low, gate.high) != (0.0, 1.0))


def always_open(mode: Mode) -> Mode:
    """The mode with every reference present in all samples and visible at every noise level."""
    opened = [replace(c, p=1.0, sigmas=[0.0, 1.0]) if c in mode.references else c for c in mode.conditions]
    return replace(mode, conditions=opened)


def closed(modality: Modality, name: ModalityName, token_gates: Sequence[Gate], sigma: float) -> Modality:
    """The modality with the tokens masked whose gate is closed at noise level `sigma`."""
    closed_gates = [g for g in token_gates if g.modality is name and not g.low <= sigma <= g.high]
    if not closed_gates:
        return modality
    weights = torch.ones(modality.latent.shape[:2], device=modality.latent.device)
    for gate in closed_gates:
        weights[:, gate.first : gate.last] = 0
    own, other = modality.attention_mask, modality.cross_mask
    self_mask = weights if own is None else own * (weights[:, None] if own.ndim == 3 else weights)
    return replace(modality, attention_mask=self_mask, cross_mask=weights if other is None else other * weights)


def attached(modality: Modality, references: Sequence[Reference], target: Tensor, fps: Tensor) -> Modality:
    """Appends clean reference tokens after the target tokens, with timestep 0 and no loss.

    References of strength 1 may come in any order. With fractional ones, two references see each other only if both
    come before the first of these, as in the reference implementation. target: the target's latent, for the scale
    between the two grids. fps: (B,). A reference that is visible in no sample of the batch is left out. In samples
    where it is not visible, its attention weight is 0.

    A strength between 0 and 1 means what it does in the reference implementation: the weight between target and
    reference in both directions, while the reference attends to itself with weight 1, and to other references not at
    all; the other modality sees it in full. Strength 0 hides it.
    """
    for reference in references:
        if bool(reference.visible.any()):
            modality = _appended(modality, reference, target, fps)
    return modality


def bounds(condition: Condition, latent: Tensor, target: Tensor, fps: Tensor) -> Tensor:
    """(B, n, R, 2) float32: [start, end) of the reference's tokens on the target's axes."""
    if condition.stream is ModalityName.audio:
        intervals = positions.audio(latent.shape[2]).expand(latent.shape[0], -1, -1, -1).clone()
    else:
        scale = condition.spatial_scale or spatial_scale(latent, target)
        slower = condition.temporal_scale or temporal_scale(latent, target)
        sizes = (latent.shape[2], latent.shape[3], latent.shape[4])
        per_sample = [
            positions.video_reference(*sizes, float(f), spatial_scale=scale, temporal_scale=slower) for f in fps
        ]
        intervals = torch.stack(per_sample)
        if condition.at_s is not None:
            intervals[:, 0] += condition.at_s
    if condition.position is Placement.negative:
        # In the reference implementation's order, for equal rounding.
        intervals[:, 0] = intervals[:, 0] - intervals[:, 0, -1:, 1:] - condition.gap_s
    return intervals


def spatial_scale(latent: Tensor, target: Tensor) -> int:
    """The factor between the target's grid and the reference's. DataError unless it is one whole number."""
    scales = {wide / narrow for wide, narrow in zip(target.shape[3:], latent.shape[3:], strict=True)}
    scale = scales.pop()
    if scales or scale != int(scale):
        raise DataError(
            f"the reference has {list(latent.shape[3:])} latents and the target {list(target.shape[3:])}: the target "
            "must be a whole number of times as large, or set the condition's spatial_scale"
        )
    return int(scale)


def temporal_scale(latent: Tensor, target: Tensor) -> int:
    """How many times lower the reference's frame rate is. DataError unless it is one whole number.

    Latents behind the first one stand for equally long pieces. A single one is a picture, whatever the target's length.
    """
    pieces, length = latent.shape[2] - 1, target.shape[2] - 1
    if pieces == 0:
        return 1
    if length % pieces:
        raise DataError(
            f"the reference has {pieces + 1} latents in time and the target {length + 1}: behind the first one the "
            "target must have a whole number of times as many, or set the condition's temporal_scale"
        )
    return max(1, length // pieces)


def tokens(latent: Tensor) -> Tensor:
    """Latents (B, C, F, H, W) or (B, c, T, f) to tokens (B, T, C) float32."""
    if latent.ndim == 5:
        return latent.float().flatten(2).transpose(1, 2)
    return latent.float().transpose(1, 2).flatten(2)


def _appended(modality: Modality, reference: Reference, target: Tensor, fps: Tensor) -> Modality:
    condition, clean = reference.condition, tokens(reference.latent)
    count, device = clean.shape[1], clean.device
    intervals = bounds(condition, reference.latent, target, fps).to(device)
    visible = reference.visible.float().to(device) * (condition.strength > 0)
    return replace(
        modality,
        latent=torch.cat([modality.latent, clean], dim=1),
        timesteps=torch.cat([modality.timesteps, torch.zeros(clean.shape[:2], device=device)], dim=1),
        positions=torch.cat([modality.positions, intervals], dim=2),
        attention_mask=_self_mask(modality, tokens(target).shape[1], count, visible=visible, condition=condition),
        cross_mask=_extended(modality.cross_mask, modality, count, visible * condition.crossed),
        reads_text=_extended(modality.reads_text, modality, count, torch.ones_like(visible) * condition.reads_text),
    )


def _self_mask(
    before: Modality, targets: int, count: int, *, visible: Tensor, condition: Condition
) -> Tensor | None:  # fmt: skip
    """Weights of the keys for all queries, (B, T + count), or one row for each query where a strength is fractional."""
    mask, strength = before.attention_mask, condition.strength
    if strength in (0.0, 1.0) and (mask is None or mask.ndim == 2):
        return _extended(mask, before, count, visible)
    batch, total = before.latent.shape[:2]
    old = torch.ones(batch, total, total, device=visible.device)
    if mask is not None:
        old = mask if mask.ndim == 3 else mask[:, None].expand(-1, total, -1)
    rows = old.new_zeros(batch, total + count, total + count)
    rows[:, :total, :total] = old
    rows[:, :targets, total:] = (visible * strength)[:, None, None]
    rows[:, total:, :targets] = strength or 1.0
    rows[:, total:, total:] = 1
    return rows


def _extended(weights: Tensor | None, before: Modality, count: int, value: Tensor) -> Tensor | None:
    """(B, T + count): the weights with `value` (B,) for the new tokens; None if all are 1, which is the fast path."""
    if weights is None and bool((value == 1).all()):
        return None
    if weights is None:
        weights = torch.ones(before.latent.shape[:2], device=value.device)
    return torch.cat([weights, value[:, None].expand(-1, count)], dim=1)
