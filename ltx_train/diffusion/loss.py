"""The training loss: masked mean squared error of the velocity, float32, per modality and sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """Factors of the modalities' losses (numbers, or scalar tensors on the losses' device), and the noise-level
    weighting `levels`: none or cosmap."""

    video: float | Tensor = 1.0
    audio: float | Tensor = 1.0
    levels: str = "none"


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Per-sample loss (B,) float32 of prediction and target (B, T, C) with token weights mask (B, T).

    Mean over tokens and channels of mask * (prediction - target)^2, divided by the mean of the mask.
    A sample whose mask is zero everywhere has loss 0; `conditions` refuses samples without tokens to predict.
    """
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    weights = mask.float()
    return (error * weights).mean(dim=-1) / weights.mean(dim=-1).clamp_min(1e-8)


def weighted_total(video: Tensor | None, audio: Tensor | None, weights: Weights) -> Tensor:
    """Scalar loss: weighted sum over the modalities, mean over the batch. ValueError without any loss."""
    pairs = ((weights.video, video), (weights.audio, audio))
    parts = [weight * loss for weight, loss in pairs if loss is not None]
    if not parts:
        raise ValueError("no modality is generated, so there is no loss")
    return sum(parts[1:], parts[0]).mean()


def level_weight(kind: str, sigma: Tensor) -> Tensor | float:
    """Weight of a sample by its noise level (B,). cosmap: 2 / (pi (1 - 2 s + 2 s^2)), Esser et al. 2024, "Scaling
    Rectified Flow Transformers", section 3.1."""
    if kind == "none":
        return 1.0
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    raise ValueError(f"unknown noise-level weighting {kind!r}")
