"""Reading goldens and comparing with the tolerances of their README."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from ltx_train.contracts import Modality
from tests.conftest import GOLDEN

Tensors = dict[str, Tensor]


def read(name: str) -> Tensors:
    return load_file(GOLDEN / f"{name}.safetensors")


def modality(tensors: Tensors, name: str) -> Modality | None:
    """The model's input of one stream, or None where the case has none."""
    if f"{name}.latent" not in tensors:
        return None
    fields = ("latent", "timesteps", "sigma", "positions", "context", "context_mask", "attention_mask")
    return Modality(**{field: tensors.get(f"{name}.{field}") for field in fields})  # type: ignore[arg-type]


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def assert_close(found: Tensor, wanted: Tensor, absolute: float, relative: float) -> None:
    """Both limits of the goldens' README."""
    found = found.detach()
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= absolute
    assert relative_rms(found, wanted) <= relative


def losses(tensors: Tensors, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample losses of both modalities under the case's masks."""
    from ltx_train.diffusion.loss import masked_mse

    def one(name: str, prediction: Tensor) -> Tensor:
        target = tensors[f"{name}.target"]
        return masked_mse(prediction[:, : target.shape[1]], target, tensors[f"{name}.loss_mask"])

    return one("video", video), one("audio", audio)


def bfloat16(tensors: Tensors) -> Tensors:
    """Latents and contexts in bfloat16; timesteps, sigma and positions stay float32."""
    return {k: v.to(torch.bfloat16) if k.endswith((".latent", ".context")) else v for k, v in tensors.items()}
