"""The forward pass to losses, which training and evaluation share, and the backward pass to gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ltx_train.contracts import Modality, StepResult, Velocity
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.loss import Weights, level_weight, masked_mse, weighted_total

Predictor = Callable[[Modality | None, Modality | None], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Arguments of one forward and backward pass, over the samples of a micro-batch in one mode: inputs on the device,
    loss weights, and gradient scale."""

    inputs: ModelInputs
    weights: Weights
    scale: float = 1.0


def backward(predict: Predictor, micro_batch: MicroBatch) -> StepResult:
    """Accumulates the gradients of the scaled loss into the parameters. Returns the detached, unscaled losses."""
    result = losses(predict, micro_batch.inputs, micro_batch.weights)
    (result.loss * micro_batch.scale).backward()
    return StepResult(result.loss.detach(), _detached(result.video), _detached(result.audio), result.sigma)


def losses(predict: Predictor, inputs: ModelInputs, weights: Weights) -> StepResult:
    """The losses of the predicted velocities of the target tokens. Predictions for reference tokens are dropped.

    The losses per modality are unweighted. The total includes all weights.
    """
    video, audio = predict(inputs.video, inputs.audio)
    video_loss, video_part = _loss(video, inputs.video, inputs.video_velocity, weights)
    audio_loss, audio_part = _loss(audio, inputs.audio, inputs.audio_velocity, weights)
    leading = inputs.video if inputs.video_velocity is not None else inputs.audio
    assert leading is not None
    return StepResult(weighted_total(video_part, audio_part, weights), video_loss, audio_loss, leading.sigma)


def _detached(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else loss.detach()


def _loss(
    prediction: Tensor | None, modality: Modality | None, velocity: Velocity | None, weights: Weights
) -> tuple[Tensor | None, Tensor | None]:
    """The unweighted loss (B,) and the loss weighted by noise level (B,)."""
    if prediction is None or modality is None or velocity is None:
        return None, None
    plain = masked_mse(prediction[:, : velocity.target.shape[1]], velocity.target, velocity.loss_mask)
    return plain, plain * level_weight(weights.levels, modality.sigma)
