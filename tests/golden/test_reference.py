"""Strengths of references, whole denoising loops and perturbations, as release 1.0.0 of the reference computes them.

alone: the release without audio. out: the release where every token of a sample has one noise level. corrected: the
release with its cross-attention between the modalities modulated by a token's own timestep, as in later releases and
in the goldens `transformer_*`; corrected_sigma0: also with noise level 0 of a frozen modality.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ltx_train.contracts import Batch, Condition, ConditionKind, Modality, ModalityName, Mode, Placement
from ltx_train.diffusion import conditions, sigma
from ltx_train.diffusion.conditions import Draws, ModelInputs
from ltx_train.model import codecs, load_transformer
from ltx_train.model.transformer import Perturbation, Transformer
from ltx_train.sampling import sampler
from ltx_train.sampling.guidance import NEUTRAL, Guidance, Guider
from ltx_train.sampling.sampler import SamplerInputs
from tests.conftest import GOLDEN, TINY
from tests.golden.support import Tensors, assert_close, modality, read

STRENGTHS = ("fractional", "fractional_two", "fractional_two_b", "keyframe")
LOOPS = ("loop_a_guided", "loop_b_skip_step", "loop_c_frozen_audio", "loop_d_second_stage")
GRID = (3, 2, 3)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_transformer(TINY)


def facts(case: str) -> dict[str, Any]:
    with safe_open(GOLDEN / f"reference_{case}.safetensors", "pt") as file:
        return {n: json.loads(v) if n in ("strengths", "parameters") else v for n, v in file.metadata().items()}


def assembled(case: str, tensors: Tensors, strengths: list[float]) -> ModelInputs:
    """Our own inputs from the case's latents, noise and strengths."""
    more: dict[str, Any] = {}
    if case == "keyframe":
        about = facts(case)
        more = {"at_s": int(about["frame_idx"]) / float(about["fps"]), "spatial_scale": 1}
    names = sorted(name for name in tensors if name.startswith(("reference", "keyframe")))
    held = [
        Condition(kind=ConditionKind.reference, modality=ModalityName.video, source=name, position=Placement.overlap,
                  strength=strength, **more)
        for name, strength in zip(names, strengths, strict=True)
    ]  # fmt: skip
    batch = Batch(
        keys=("a",), speakers=("",), draws=(0,), fps=torch.tensor([24.0]),
        video_latent=tensors["target_latent"][None], audio_latent=tensors["audio_latent"][None],
        video_context=tensors["video.context"], audio_context=tensors["audio.context"],
        references={c.name: tensors[c.source][None] for c in held},
    )  # fmt: skip
    draws = Draws(
        video_sigma=tensors["video.sigma"], audio_sigma=tensors["audio.sigma"], video_noise=tensors["video.noise"],
        audio_noise=tensors["audio.noise"], chosen=(torch.tensor([True]),) * len(held),
        numbers=(torch.zeros(1, 4),) * len(held),
    )  # fmt: skip
    return conditions.assemble(batch, Mode(conditions=held), draws)


@torch.no_grad()
def both(model: Transformer, video: Modality | None, audio: Modality | None) -> tuple[Tensor, Tensor]:
    first, second = model(video, audio)
    assert first is not None
    return first, torch.zeros(()) if second is None else second


@pytest.mark.parametrize("case", STRENGTHS)
def test_a_fractional_strength_is_the_references(case: str, model: Transformer) -> None:
    """The assembled inputs are equal to the reference's, and so are the velocities; with strength 1 they are not."""
    tensors, kind = read(f"reference_{case}"), "one_frame." if case == "keyframe" else ""
    strengths = facts(case)["strengths"]
    made = assembled(case, tensors, strengths)
    assert made.video is not None
    wanted = modality(tensors, "video")
    assert wanted is not None
    positions = tensors["one_frame.positions"] if kind else wanted.positions
    assert torch.equal(made.video.positions, positions)
    assert made.video.attention_mask is not None
    assert wanted.attention_mask is not None
    assert torch.equal(made.video.attention_mask, wanted.attention_mask)
    assert torch.equal(made.video.timesteps, wanted.timesteps)
    torch.testing.assert_close(made.video.latent, wanted.latent, atol=1e-6, rtol=0)
    alone, _ = both(model, made.video, None)
    assert_close(alone, tensors[f"{kind}alone.video_velocity"], 1e-5, 2e-6)
    video, audio = both(model, made.video, made.audio)
    assert_close(video, tensors[f"{kind}corrected.video_velocity"], 1e-5, 2e-6)
    assert_close(audio, tensors[f"{kind}corrected.audio_velocity"], 1e-5, 2e-6)
    full, _ = both(model, assembled(case, tensors, [1.0] * len(strengths)).video, None)
    assert float((full - alone).abs().max()) > 0.1


def begun(tensors: Tensors) -> SamplerInputs:
    def start(name: str) -> Modality:
        mask = tensors[f"{name}.denoise_mask"]
        return Modality(
            latent=tensors[f"{name}.start"], timesteps=mask, sigma=mask.amax(dim=1),
            positions=tensors[f"{name}.positions"], context=tensors[f"{name}.context"],
        )  # fmt: skip

    return SamplerInputs(
        video=start("video"), audio=start("audio"), negative_video=tensors.get("video.negative_context"),
        negative_audio=tensors.get("audio.negative_context"),
    )  # fmt: skip


def guidance(parameters: dict[str, Any]) -> Guidance:
    given = parameters["guider"]
    if given is None:
        return Guidance()

    def guider(p: dict[str, Any] | None) -> Guider:
        if p is None:
            return NEUTRAL
        return Guider(
            cfg=p["cfg_scale"], stg=p["stg_scale"], blocks=tuple(p["stg_blocks"]), modality=p["modality_scale"],
            rescale=p["rescale_scale"],
        )  # fmt: skip

    return Guidance(video=guider(given["video"]), audio=guider(given["audio"]), skip=given["video"]["skip_step"])


@pytest.mark.parametrize("case", LOOPS)
def test_a_whole_loop_ends_in_the_references_latents(case: str, model: Transformer) -> None:
    """Guided by modality, with steps that repeat a prediction, for a frozen sound, and from a first stage's latents."""
    tensors = read(f"reference_{case}")
    how = guidance(facts(case)["parameters"])
    video, audio = sampler.sample(model, begun(tensors), tensors["sigmas"], how)
    assert video is not None
    assert audio is not None
    frozen = case == "loop_c_frozen_audio"
    wanted = tensors["corrected_sigma0.video_latent" if frozen else "out.video_latent"]
    assert_close(codecs.video_grid(video, *GRID), wanted, 3e-5, 5e-6)
    assert_close(codecs.audio_grid(audio, 2), tensors["out.audio_latent"], 3e-5, 5e-6)


def test_the_schedules_are_the_references() -> None:
    assert torch.equal(sigma.inference_schedule(4), read("reference_loop_a_guided")["sigmas"])
    assert torch.equal(sigma.refining_schedule(), read("reference_loop_d_second_stage")["sigmas"])


def test_one_of_two_samples_perturbed_is_both_by_themselves(model: Transformer) -> None:
    """The reference perturbs samples of a batch one by one. Here a call perturbs all of its samples."""
    tensors = read("reference_perturbation")
    video, audio = modality(tensors, "video"), modality(tensors, "audio")
    plain = both(model, video, audio)
    with torch.no_grad():
        skipped = model(video, audio, Perturbation(skip_video=frozenset({1})))
    for number, name in enumerate(("video", "audio")):
        perturbed = skipped[number]
        assert perturbed is not None
        assert_close(plain[number], tensors[f"plain.{name}_velocity"], 1e-5, 2e-6)
        assert_close(perturbed, tensors[f"every.{name}_velocity"], 1e-5, 2e-6)
        mixed = torch.stack([plain[number][0], perturbed[1]])
        assert_close(mixed, tensors[f"out.{name}_velocity"], 1e-5, 2e-6)
        assert float((plain[number][1] - perturbed[1]).abs().max()) > 0.1
