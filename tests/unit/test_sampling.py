from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx_train import config
from ltx_train.assembly.outputs import check_output
from ltx_train.contracts import Condition, ConditionKind, Mode, Role
from ltx_train.data.prepare.sound import read_audio
from ltx_train.diffusion import conditions, references, sigma
from ltx_train.evaluation import report
from ltx_train.evaluation.report import Report
from ltx_train.evaluation.rows import Grid
from ltx_train.model import load_transformer
from ltx_train.sampling import sampler
from ltx_train.sampling.guidance import Guidance, Guider, combine
from tests.conftest import REPOSITORY, TINY, command
from tests.faults.test_deepspeed import decoded
from tests.unit.test_conditions import batch

CLIP = REPOSITORY / "data/sample/speaker01_0.mp4"


def start(mode: Mode, reference: bool = False) -> tuple[sampler.SamplerInputs, conditions.ModelInputs]:
    data = batch(1, reference=reference)
    data = replace(data, video_context=torch.randn(1, 8, 64), audio_context=torch.randn(1, 8, 32))
    made = conditions.assemble(data, mode, conditions.draw(data, mode, sigma.SigmaDistribution(), 0, sigma=1.0))
    return sampler.SamplerInputs(video=made.video, audio=made.audio), made


def test_given_tokens_come_out_as_they_went_in() -> None:
    mode = Mode(conditions=[Condition(kind=ConditionKind.first_frame), Condition(kind=ConditionKind.reference)])
    begin, made = start(mode, reference=True)
    video, audio = sampler.sample(load_transformer(TINY), begin, sigma.inference_schedule(3), Guidance())
    assert made.video is not None
    assert made.audio is not None
    assert video is not None
    assert audio is not None
    assert torch.equal(video[:, :4], made.video.latent[:, :4])
    assert not torch.equal(video[:, 4:], made.video.latent[:, 4:])
    assert torch.equal(audio[:, 9:], made.audio.latent[:, 9:])


def test_a_gated_reference_is_there_at_its_noise_levels_only() -> None:
    """Open from 0.5 down: the first steps are those without a reference, the last one is not; and closed for good."""
    model, schedule = load_transformer(TINY), torch.tensor([1.0, 0.8, 0.4, 0.0])
    voice = Condition(kind=ConditionKind.reference)
    found: dict[str, torch.Tensor] = {}
    for name, gate in (("open", [0.0, 1.0]), ("late", [0.0, 0.5]), ("never", [0.0, 0.01])):
        mode = Mode(conditions=[replace(voice, sigmas=gate)])
        torch.manual_seed(0)
        begin, _ = start(references.always_open(mode), reference=True)
        gates = references.gates(mode, batch(1, reference=True))
        assert [(g.first, g.last) for g in gates] == ([] if name == "open" else [(9, 14)])
        _, audio = sampler.sample(model, replace(begin, gates=gates), schedule, Guidance())
        assert audio is not None
        found[name] = audio[:, :9]
    torch.manual_seed(0)
    begin, _ = start(Mode())
    _, without = sampler.sample(model, begin, schedule, Guidance())
    assert without is not None
    torch.testing.assert_close(found["never"], without, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found["late"], found["never"], atol=1e-4)
    assert not torch.allclose(found["late"], found["open"], atol=1e-4)


def test_frozen_audio_stays_and_is_seen() -> None:
    begin, made = start(Mode(audio=Role.freeze))
    model, schedule = load_transformer(TINY), sigma.inference_schedule(2)
    video, audio = sampler.sample(model, begin, schedule, Guidance())
    assert made.audio is not None
    assert audio is not None
    assert torch.equal(audio, made.audio.latent)
    other = replace(begin, audio=replace(made.audio, latent=made.audio.latent + 1))
    changed, _ = sampler.sample(model, other, schedule, Guidance())
    assert video is not None
    assert changed is not None
    assert not torch.equal(video, changed)


def test_the_true_velocity_leads_to_the_clean_sample() -> None:
    """With the true velocity at every level the loop ends in the clean sample."""
    begin, made = start(Mode())
    assert made.video is not None
    assert made.audio is not None
    goal = (torch.randn_like(made.video.latent), torch.randn_like(made.audio.latent))

    def oracle(video, audio, what):  # type: ignore[no-untyped-def]
        return tuple((m.latent - g) / m.timesteps[..., None] for m, g in zip((video, audio), goal, strict=True))

    found = sampler.sample(oracle, begin, sigma.inference_schedule(5), Guidance())  # type: ignore[arg-type]
    for clean, wanted in zip(found, goal, strict=True):
        assert clean is not None
        torch.testing.assert_close(clean, wanted, atol=1e-5, rtol=1e-5)


def test_guidance_by_hand() -> None:
    one, zero = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    combined = combine(one, zero, zero, 0.5 * one, cfg=3.0, stg=1.0, modality=2.0, rescale=0.0)
    assert float(combined[0, 0, 0]) == 1 + 2 * 1 + 1 * 1 + 1 * 0.5
    assert combine(one, None, None, None, cfg=3.0, stg=1.0, modality=2.0, rescale=0.7) is one


def test_guidance_runs_its_arms_and_changes_the_result() -> None:
    begin, _ = start(Mode())
    model, schedule = load_transformer(TINY), sigma.inference_schedule(2)
    plain = sampler.sample(model, begin, schedule, Guidance())[0]
    common = Guider(modality=3.0, stg=1.0, blocks=(1,), rescale=0.7)
    full = Guidance(video=replace(common, cfg=3.0), audio=replace(common, cfg=7.0))
    negative = replace(begin, negative_video=torch.randn(1, 8, 64), negative_audio=torch.randn(1, 8, 32))
    guided = sampler.sample(model, negative, schedule, full)[0]
    assert plain is not None
    assert guided is not None
    assert bool(torch.isfinite(guided).all())
    assert not torch.equal(plain, guided)


BASE = ("experiment=audio_reference", f"model.path={TINY}", "memory=none", "sample.steps=2")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("text", ("mode=t2av", "sample.prompt=a face")),
        ("first_frame", ("mode=av_i2v", f"sample.image={CLIP}")),
        ("reference", (f"sample.reference_audio={CLIP}",)),
        ("a2v", ("mode=a2v", f"sample.audio={CLIP}", "sample.video_cfg=3", "sample.modality_scale=3")),
    ],
)
def test_every_kind_of_sample_is_a_film_with_sound(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / f"{name}.mp4"
    assert command("sample", *BASE, *overrides, f"sample.out={out}") == 0
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 25
        assert sum(1 for _ in container.decode(video=0)) == 33
    waveform, rate = read_audio(out)
    assert waveform is not None
    assert rate == 48000
    assert waveform.shape[1] / rate == pytest.approx(33 / 25, abs=0.1)
    if name == "a2v":
        original, _ = read_audio(CLIP, 0.0, 33 / 25)
        assert original is not None
        count = min(original.shape[1], waveform.shape[1])
        pair = torch.stack([original[0, :count], waveform[0, :count]])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.95


def test_requests_that_cannot_be_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sample", *BASE, "mode=a2v") == 77
    assert "sample.audio=FILE: mode.audio=freeze" in capsys.readouterr().err
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert command("sample", *BASE, "mode=av_i2v", f"sample.image={tmp_path / 'x.png'}") == 78
    assert command("sample", *BASE, "data.reference_s=9", f"sample.reference_audio={CLIP}") == 78
    assert "less than 9 s of sound" in capsys.readouterr().err


@pytest.mark.slow
def test_several_clips_are_those_of_single_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By prompt and seed, with their files' own inputs, on a page."""
    words = (*BASE, "mode=av_i2v", "data.buckets=[64x64x17]", f"sample.out={tmp_path / 'a.mp4'}")
    prompts = f"sample.prompts=[a face, {{prompt: '<b>', image: {CLIP}, seed: 9}}]"
    assert command("sample", *words, prompts, "sample.seeds=[1,2]") == 0
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == [f"a-{n:02d}.mp4" for n in (1, 2, 3, 4)]
    assert "made " + str(tmp_path / "a-04.mp4") in capsys.readouterr().out
    page = (tmp_path / "a.html").read_text()
    assert [page.count(t) for t in ("<video", "seed 1<", "seed 2<", "<h3>&lt;b&gt;</h3>")] == [4, 2, 2, 1]
    single = tmp_path / "single.mp4"
    one = ("sample.prompt='<b>'", f"sample.image={CLIP}", "sample.seed=2", f"sample.out={single}")
    assert command("sample", *words[:-1], *one) == 0
    pictures = [decoded(path)[0] for path in (single, tmp_path / "a-04.mp4", tmp_path / "a-03.mp4")]
    same, other = (np.abs(pictures[0] - p).mean() for p in pictures[1:])
    assert same < 0.1 * other, "equal up to rounding; another seed is another clip"


def test_a_page_of_others_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.html").write_text("<p>mine</p>")
    words = (*BASE, "mode=t2av", "sample.seeds=[1,2]", f"sample.out={tmp_path / 'a.mp4'}")
    assert command("sample", *words) == 77
    assert "a.html exists and ltx-train did not write it" in capsys.readouterr().err
    assert (tmp_path / "a.html").read_text() == "<p>mine</p>"
    own = Report(title="t", facts={}, metrics=[], subjects=[], grid=Grid((), ()))
    (tmp_path / "own.html").write_text(report.page(own))
    check_output(config.compose_config([]), "sample.out", str(tmp_path / "own.html"))


def test_prompts_of_sample_are_checked_like_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sample", *BASE, "mode=t2av", "sample.prompts=[{promt: x}]") == 77
    assert "sample.prompts, clip 1: 'promt' is no setting of a clip" in capsys.readouterr().err
    assert command("sample", *BASE, "mode=t2av", "sample.prompts=[{prompt: x, image: gone.png}]") == 78
    assert "sample.image=gone.png" in capsys.readouterr().err
    assert command("sample", *BASE, "mode=t2av", "sample.prompts=[{prompt: x, mask: y.mp4}]") == 77
