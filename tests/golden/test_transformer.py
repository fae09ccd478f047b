"""Velocities and gradients of the reference implementation, cases a to j."""

from __future__ import annotations

import pytest
import torch

from ltx_train.model import load_transformer
from ltx_train.model.loaders import transformer_original_name
from ltx_train.model.transformer import Transformer
from tests.conftest import GOLDEN, TINY
from tests.golden.support import assert_close, bfloat16, losses, modality, read, relative_rms

CASES = sorted(path.stem for path in GOLDEN.glob("transformer_*.safetensors"))


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return load_transformer(TINY)


def test_all_thirteen_cases_are_here() -> None:
    assert len(CASES) == 13


@pytest.mark.parametrize("case", CASES)
def test_velocities(case: str, transformer: Transformer) -> None:
    tensors = read(case)
    with torch.no_grad():
        found = transformer(modality(tensors, "video"), modality(tensors, "audio"))
    for velocity, name in zip(found, ("video", "audio"), strict=True):
        wanted = tensors.get(f"out.{name}_velocity")
        assert (velocity is None) == (wanted is None)
        if velocity is not None and wanted is not None:
            assert_close(velocity, wanted, 1e-5, 2e-6)


@pytest.mark.parametrize("case", CASES)
def test_velocities_in_bfloat16(case: str) -> None:
    tensors = read(case)
    half = load_transformer(TINY, dtype=torch.bfloat16)
    inputs = bfloat16(tensors)
    with torch.no_grad():
        found = half(modality(inputs, "video"), modality(inputs, "audio"))
    for velocity, name in zip(found, ("video", "audio"), strict=True):
        if velocity is not None:
            assert velocity.dtype == torch.bfloat16
            assert relative_rms(velocity.float(), tensors[f"out.{name}_velocity"]) < 2e-2


def test_gradients() -> None:
    tensors = read("transformer_i_gradients")
    model = load_transformer(TINY).requires_grad_(True)
    found = model(modality(tensors, "video"), modality(tensors, "audio"))
    assert found[0] is not None
    assert found[1] is not None
    video, audio = losses(tensors, found[0], found[1])
    assert_close(video, tensors["out.loss_video_per_sample"], 1e-5, 1e-6)
    assert_close(audio, tensors["out.loss_audio_per_sample"], 1e-5, 1e-6)
    (video + audio).mean().backward()
    by_name = {transformer_original_name(name): p.grad for name, p in model.named_parameters()}
    wanted = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert len(wanted) == 6
    for name, gradient in wanted.items():
        found_gradient = by_name[name]
        assert found_gradient is not None
        assert_close(found_gradient, gradient, 1e-6, 1e-5)


def test_absent_modality_costs_nothing(transformer: Transformer) -> None:
    """No audio module runs when there is no audio."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in transformer.named_modules()
        if "audio" in name or "a2v" in name or "v2a" in name
    ]
    with torch.no_grad():
        transformer(modality(read("transformer_g_video_only"), "video"), None)
    for handle in handles:
        handle.remove()
    assert called == []


@pytest.mark.parametrize("case", ["transformer_c_audio_ref_negative", "transformer_h_fractional_mask"])
def test_token_order_is_free(case: str, transformer: Transformer) -> None:
    """A negative control for positions: moved together nothing changes, moved alone the output does."""
    from dataclasses import replace

    tensors = read(case)
    video, audio = modality(tensors, "video"), modality(tensors, "audio")
    assert audio is not None
    shift = replace(audio, positions=audio.positions + 0.5)
    with torch.no_grad():
        first, second = transformer(video, audio)[1], transformer(video, shift)[1]
    assert first is not None
    assert second is not None
    assert relative_rms(second, first) > 1e-3
