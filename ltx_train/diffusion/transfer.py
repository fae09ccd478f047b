"""Copies model inputs to a device through pinned memory, with the timesteps as distinct levels.

Owns the copies; knows nothing of modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltx_train.contracts import Batch, Levels, Modality, Velocity
from ltx_train.diffusion.conditions import ModelInputs


def distinct(timesteps: Tensor) -> Levels:
    """The distinct timesteps of (B, T), padded to B + 1: one level per sample, and 0 for clean tokens.

    With the padding, compiled graphs see a constant shape. Call it with CPU tensors: on a GPU it waits for the device.
    """
    values, index = torch.unique(timesteps.float(), return_inverse=True)
    missing = timesteps.shape[0] + 1 - values.numel()
    return Levels(torch.cat([values, values[-1:].expand(max(0, missing))]), index)


def to_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """The inputs on `device`. `timesteps` stay where they are; their distinct `levels` are copied instead."""
    return ModelInputs(
        video=_moved(inputs.video, device),
        audio=_moved(inputs.audio, device),
        video_velocity=_moved_velocity(inputs.video_velocity, device),
        audio_velocity=_moved_velocity(inputs.audio_velocity, device),
    )


def batch_to(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device, for assembling its inputs there."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to every tensor in nested dataclasses and dicts. All other values stay the same."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, dict):
        items: dict[str, Any] = value
        return {name: map_tensors(item, change) for name, item in items.items()}
    return value


def _moved(modality: Modality | None, device: torch.device) -> Modality | None:
    if modality is None:
        return None
    names = (
        "latent",
        "sigma",
        "positions",
        "context",
        "context_mask",
        "attention_mask",
        "cross_mask",
        "reads_text",
    )
    tensors: dict[str, Tensor | None] = {name: getattr(modality, name) for name in names}
    levels = distinct(modality.timesteps)
    levels = Levels(_copied(levels.values, device), _copied(levels.index, device))
    return replace(modality, levels=levels, **{k: _copied(t, device) for k, t in tensors.items() if t is not None})


def _moved_velocity(velocity: Velocity | None, device: torch.device) -> Velocity | None:
    if velocity is None:
        return None
    return Velocity(_copied(velocity.target, device), _copied(velocity.loss_mask, device))


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Copies to a GPU go through pinned memory, so that they overlap with computation."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # An expanded tensor, such as one noise level for all samples, has no memory for each element to pin.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
