"""Positions, the sigma distribution, the sampling schedule and the assembly of inputs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from ltx_train.contracts import Batch, Condition, ConditionKind, ModalityName, Mode, Placement, Role
from ltx_train.diffusion import conditions, grid, positions, references, sigma
from ltx_train.model import codecs
from tests.conftest import GOLDEN
from tests.golden.support import assert_close, read

SAMPLER: dict[str, Any] = json.loads((GOLDEN / "sampler.json").read_text())
PLACES: dict[str, Any] = json.loads((GOLDEN / "positions.json").read_text())


@pytest.mark.parametrize("entry", PLACES["video"], ids=lambda e: e["key"])
def test_video_positions(entry: dict[str, Any]) -> None:
    assert grid.latent_frames(entry["frames"]) == entry["latent_frames"]
    found = positions.video(entry["latent_frames"], entry["latent_height"], entry["latent_width"], entry["fps"])
    torch.testing.assert_close(found, read("positions")[entry["key"]], atol=4e-6, rtol=0)


@pytest.mark.parametrize("key", sorted(k for k in read("positions") if k.startswith("audio")))
def test_audio_positions(key: str) -> None:
    wanted = read("positions")[key]
    found = positions.audio(wanted.shape[1])
    if key.startswith("audio_reference"):
        found = references.bounds(REFERENCE, torch.zeros(1, 2, wanted.shape[1], 16), torch.zeros(()), torch.zeros(1))[0]
    torch.testing.assert_close(found, wanted, atol=4e-6, rtol=0)


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


FIRST, REFERENCE = Condition(kind=ConditionKind.first_frame), Condition(kind=ConditionKind.reference)
VIDEO = Condition(kind=ConditionKind.reference, source="reference_video_latent", position=Placement.overlap)


def _batch(tensors: dict[str, torch.Tensor], fps: float, mode: Mode, shape: tuple[int, int, int]) -> Batch:
    """The golden's clean tokens as a prepared batch; shape is that of a video reference."""
    video, audio = tensors["video.x0"], tensors["audio.x0"]
    beside = {}
    for condition in mode.references:
        if condition.stream is ModalityName.audio:
            beside[condition.name] = codecs.audio_grid(audio[:, -7:], 2)
            audio = audio[:, :-7]
        else:
            count = math.prod(shape)
            beside[condition.name] = codecs.video_grid(video[:, -count:], *shape)
            video = video[:, :-count]
    return Batch(
        keys=("a", "b"), speakers=("", ""), draws=(0, 0), fps=torch.full((2,), fps),
        video_latent=codecs.video_grid(video, 3, 2, video.shape[1] // 6), audio_latent=codecs.audio_grid(audio, 2),
        video_context=tensors["video.context"], audio_context=tensors["audio.context"],
        references=beside,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "mode", "shape"),
    [
        ("a_t2v", Mode(), (0, 0, 0)),
        ("b_first_frame", Mode(conditions=[FIRST]), (0, 0, 0)),
        ("c_audio_ref_negative", Mode(conditions=[REFERENCE]), (0, 0, 0)),
        ("d_video_ref", Mode(conditions=[VIDEO]), (3, 2, 3)),
        ("d2_video_ref_half_resolution", Mode(conditions=[VIDEO]), (3, 1, 2)),
        ("e_frozen_audio", Mode(audio=Role.freeze), (0, 0, 0)),
        ("e2_frozen_video", Mode(video=Role.freeze), (0, 0, 0)),
    ],
)
def test_assembled_inputs(case: str, mode: Mode, shape: tuple[int, int, int]) -> None:
    """From clean latents, sigma and noise to the very tensors that went into the reference model."""
    tensors = read(f"transformer_{case}")
    batch = _batch(tensors, 30.0 if case.startswith("d2") else 24.0, mode, shape)
    noise = {name: tensors.get(f"{name}.noise") for name in ("video", "audio")}
    first = tensors["video.denoise_mask"][:, 0] == 0 if "video.denoise_mask" in tensors else torch.ones(2) > 0
    chosen = tuple(first if c.kind is ConditionKind.first_frame else torch.ones(2) > 0 for c in mode.conditions)
    draws = conditions.Draws(
        video_sigma=tensors["video.sigma"],
        audio_sigma=tensors["audio.sigma"],
        video_noise=noise["video"],
        audio_noise=noise["audio"],
        chosen=chosen,
        numbers=tuple(torch.zeros(2, 4) for _ in chosen),
    )
    inputs = conditions.assemble(batch, mode, draws)
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
