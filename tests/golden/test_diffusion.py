"""Positions, the sigma distribution, the sampling schedule and the assembly of inputs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ltx_train.contracts import Batch, Condition, ConditionKind, Mode, Role
from ltx_train.diffusion import conditions, positions, sigma
from ltx_train.model import codecs
from tests.conftest import GOLDEN
from tests.golden.support import assert_close, read

SAMPLER: dict[str, Any] = json.loads((GOLDEN / "sampler.json").read_text())
PLACES: dict[str, Any] = json.loads((GOLDEN / "positions.json").read_text())


@pytest.mark.parametrize("entry", PLACES["video"], ids=lambda e: e["key"])
def test_video_positions(entry: dict[str, Any]) -> None:
    assert positions.latent_frames(entry["frames"]) == entry["latent_frames"]
    found = positions.video(entry["latent_frames"], entry["latent_height"], entry["latent_width"], entry["fps"])
    torch.testing.assert_close(found, read("positions")[entry["key"]], atol=4e-6, rtol=0)


@pytest.mark.parametrize("key", sorted(k for k in read("positions") if k.startswith("audio")))
def test_audio_positions(key: str) -> None:
    wanted = read("positions")[key]
    made = positions.negative_audio if key.startswith("audio_reference") else positions.audio
    torch.testing.assert_close(made(wanted.shape[1]), wanted, atol=4e-6, rtol=0)


@pytest.mark.parametrize("case", SAMPLER["cases"], ids=lambda c: f"{c['tokens']} tokens")
def test_sigma_of_given_draws(case: dict[str, Any]) -> None:
    params = sigma.SigmaDistribution(**SAMPLER["parameters"][case["parameters"]])
    normal, uniform, selector = (torch.tensor(SAMPLER["draws"][k]) for k in ("normal", "uniform", "selector"))
    found = sigma.shifted_logit_normal(normal, uniform, selector, case["tokens"], params)
    assert sigma.shift(case["tokens"]) == pytest.approx(case["mu"], abs=1e-9)
    torch.testing.assert_close(found, torch.tensor(case["sigma"]), atol=case["sigma_tolerance"], rtol=0)


@pytest.mark.parametrize("case", SAMPLER["cases"], ids=lambda c: f"{c['tokens']} tokens")
def test_sigma_distribution(case: dict[str, Any]) -> None:
    count = SAMPLER["quantile_draws"]
    stream = torch.Generator().manual_seed(7)
    draws = (torch.randn(count, generator=stream), *torch.rand(2, count, generator=stream))
    params = sigma.SigmaDistribution(**SAMPLER["parameters"][case["parameters"]])
    found = sigma.shifted_logit_normal(*draws, case["tokens"], params)
    for level, wanted in case["quantiles"].items():
        assert float(found.quantile(float(level))) == pytest.approx(wanted, abs=case["quantile_tolerance"][level])
    assert float(found.mean()) == pytest.approx(case["mean"], abs=case["mean_tolerance"])


@pytest.mark.parametrize("entry", SAMPLER["inference_schedule"], ids=lambda e: f"{e['steps']} steps")
def test_inference_schedule(entry: dict[str, Any]) -> None:
    found = sigma.inference_schedule(entry["steps"], entry["tokens"])
    torch.testing.assert_close(found, torch.tensor(entry["sigmas"]), atol=1e-6, rtol=0)


def _batch(tensors: dict[str, torch.Tensor], fps: float, references: int) -> Batch:
    """The golden's clean tokens as a prepared batch."""
    targets = {name: tensors[f"{name}.latent"].shape[1] for name in ("video", "audio")}
    audio = tensors["audio.x0"]
    target = targets["audio"] - references
    return Batch(
        keys=("a", "b"), speakers=("", ""), draws=(0, 0), fps=torch.full((2,), fps),
        video_latent=codecs.video_grid(tensors["video.x0"], 3, 2, 3),
        audio_latent=codecs.audio_grid(audio[:, :target], 2),
        video_context=tensors["video.context"], audio_context=tensors["audio.context"],
        reference_audio=codecs.audio_grid(audio[:, target:], 2) if references else None,
    )  # fmt: skip


FIRST, REFERENCE = Condition(ConditionKind.first_frame), Condition(ConditionKind.reference)


@pytest.mark.parametrize(
    ("case", "mode", "references"),
    [
        ("a_t2v", Mode(), 0),
        ("b_first_frame", Mode(conditions=[FIRST]), 0),
        ("c_audio_ref_negative", Mode(conditions=[REFERENCE]), 7),
        ("e_frozen_audio", Mode(audio=Role.freeze), 0),
        ("e2_frozen_video", Mode(video=Role.freeze), 0),
    ],
)
def test_assembled_inputs(case: str, mode: Mode, references: int) -> None:
    """From clean latents, sigma and noise to the very tensors that went into the reference model."""
    tensors = read(f"transformer_{case}")
    first = (
        tensors["video.denoise_mask"][:, 0] == 0 if mode.condition(ConditionKind.first_frame) else torch.zeros(2) > 0
    )
    draws = conditions.Draws(
        tensors["video.sigma"], tensors["audio.sigma"], tensors.get("video.noise"), tensors.get("audio.noise"), first
    )
    inputs = conditions.assemble(_batch(tensors, 24.0, references), mode, draws)
    for name, modality, velocity in (
        ("video", inputs.video, inputs.video_velocity),
        ("audio", inputs.audio, inputs.audio_velocity),
    ):
        assert modality is not None
        assert_close(modality.latent, tensors[f"{name}.latent"], 1e-6, 1e-6)
        for field in ("timesteps", "sigma", "positions"):
            torch.testing.assert_close(getattr(modality, field), tensors[f"{name}.{field}"], atol=4e-6, rtol=0)
        assert (velocity is None) == (f"{name}.target" not in tensors)
        if velocity is not None:
            assert_close(velocity.target, tensors[f"{name}.target"], 1e-6, 1e-6)
            assert torch.equal(velocity.loss_mask, tensors[f"{name}.loss_mask"])
