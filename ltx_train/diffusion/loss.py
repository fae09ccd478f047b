"""The training loss: masked mean square of the velocity error, float32, per modality and sample."""

from __future__ import annotations

from torch import Tensor


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Per-sample loss (B,) float32 of prediction and target (B, T, C) under mask (B, T).

    mean over tokens and channels of mask * (prediction - target)^2, divided by the mean of the mask.
    A row whose mask is all zero gives 0; `conditions` refuses a batch in which every row is so.
    """
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    weights = mask.float()
    return (error * weights).mean(dim=-1) / weights.mean(dim=-1).clamp_min(1e-8)


def weighted_total(video: Tensor | None, audio: Tensor | None, video_weight: float, audio_weight: float) -> Tensor:
    """Scalar loss: weighted sum of the modalities, mean over the batch."""
    parts = [weight * loss for weight, loss in ((video_weight, video), (audio_weight, audio)) if loss is not None]
    if not parts:
        raise ValueError("no modality is generated, so there is no loss")
    return sum(parts[1:], parts[0]).mean()
