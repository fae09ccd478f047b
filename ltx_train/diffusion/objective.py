"""One forward pass to losses: the step that training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ltx_train.contracts import Modality, StepResult, Velocity
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.loss import masked_mse, weighted_total

Predictor = Callable[[Modality | None, Modality | None], tuple[Tensor | None, Tensor | None]]


def losses(predict: Predictor, inputs: ModelInputs, video_weight: float, audio_weight: float) -> StepResult:
    """Velocities of the target tokens against their targets; reference tokens are cut off."""
    video, audio = predict(inputs.video, inputs.audio)
    video_loss = _loss(video, inputs.video_velocity)
    audio_loss = _loss(audio, inputs.audio_velocity)
    leading = inputs.video if inputs.video_velocity is not None else inputs.audio
    assert leading is not None
    total = weighted_total(video_loss, audio_loss, video_weight, audio_weight)
    return StepResult(total, video_loss, audio_loss, leading.sigma)


def _loss(prediction: Tensor | None, velocity: Velocity | None) -> Tensor | None:
    if prediction is None or velocity is None:
        return None
    return masked_mse(prediction[:, : velocity.target.shape[1]], velocity.target, velocity.loss_mask)
