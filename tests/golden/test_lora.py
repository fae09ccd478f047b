"""Adapters of the reference implementation: outputs at two strengths, loss, gradients."""

from __future__ import annotations

import pytest
import torch

from ltx_train.model import adapter, export, load_transformer, lora_file
from tests.conftest import GOLDEN, TINY
from tests.golden.support import assert_close, losses, modality, read

ADAPTERS = {"audio": 30, "cross_modal": 24, "default": 72}


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("merged", [False, True])
def test_outputs(name: str, strength: float, merged: bool) -> None:
    case, wanted = read("transformer_c_audio_ref_negative"), read(f"lora_{name}_expected")
    tensors, _ = lora_file.read_lora(GOLDEN / f"lora_{name}.safetensors")
    assert len(tensors) == 2 * ADAPTERS[name]
    model = load_transformer(TINY)
    if merged:
        export.merge(model, tensors, strength)
    else:
        export.bind(model, tensors, strength)
    with torch.no_grad():
        video, audio = model(modality(case, "video"), modality(case, "audio"))
    assert video is not None
    assert audio is not None
    assert_close(video, wanted[f"strength_{strength}.video_velocity"], 1e-5, 2e-6)
    assert_close(audio, wanted[f"strength_{strength}.audio_velocity"], 1e-5, 2e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_and_gradients(name: str) -> None:
    case, wanted = read("transformer_c_audio_ref_negative"), read(f"lora_{name}_expected")
    tensors, _ = lora_file.read_lora(GOLDEN / f"lora_{name}.safetensors")
    model = load_transformer(TINY)
    export.bind(model, tensors)
    video, audio = model(modality(case, "video"), modality(case, "audio"))
    assert video is not None
    assert audio is not None
    total = sum(losses(case, video, audio))
    assert isinstance(total, torch.Tensor)
    assert_close(total, wanted["strength_1.0.loss_per_sample"], 1e-5, 1e-6)
    total.mean().backward()
    gradients = adapter.lora_parameters(model)
    checked = {k.removeprefix("grad.diffusion_model."): v for k, v in wanted.items() if k.startswith("grad.")}
    assert len(checked) == 2 * ADAPTERS[name]
    for key, gradient in checked.items():
        found = gradients[key].grad
        assert found is not None
        assert_close(found, gradient, 1e-6, 1e-5)
