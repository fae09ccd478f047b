"""Every trained mode can be sampled: it gets what it needs, and refuses what it lacks and what it does not use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx_train import config
from ltx_train.assembly import encoder_builder, given_media, requests
from ltx_train.assembly.given_media import GivenMedia
from ltx_train.config import Config, clip_inputs
from ltx_train.config.files import group_options
from ltx_train.contracts import ConditionKind, ConfigError, DataError, ModalityName, Role
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.media import probe
from ltx_train.data.prepare.sound import read_audio
from ltx_train.diffusion import conditions, positions, references, sigma
from ltx_train.model import load_transformer
from ltx_train.sampling import sampler
from ltx_train.sampling.media import Sound, image_to_pixels, write_mp4
from tests.conftest import REPOSITORY, TINY, command

CLIP, OTHER = (REPOSITORY / f"data/sample/speaker0{n}_0.mp4" for n in (1, 2))
MASK = Path(tempfile.gettempdir()) / f"ltx-train-mask-{os.getpid()}.mp4"
BASE = (f"model.path={TINY}", "memory=none", "data.buckets=[64x64x33]", "sample.steps=2", "data.reference_s=0.5")
# What each mode needs; a second tuple is what it may be given, too.
NEEDS: dict[str, tuple[str, ...]] = {
    "a2a_ic": (f"sample.reference_audio={CLIP}",),
    "a2v": (f"sample.audio={CLIP}",),
    "audio_extend": (f"sample.audio={CLIP}",),
    "audio_inpaint": (f"sample.audio={CLIP}", "sample.audio_mask='0-0.3'"),
    "audio_reference": (f"sample.reference_audio={CLIP}",),
    "av2av_ic": (),
    "av_i2v": (),
    "extend": (f"sample.video={CLIP}",),
    "i2v": (),
    "id_lora": (f"sample.reference_audio={CLIP}",),
    "inpaint": (f"sample.video={CLIP}", f"sample.mask={MASK}"),
    "multi_reference_ic": (),
    "outpaint": (f"sample.video={CLIP}", "sample.region=[0,0,32,64]"),
    "suffix": (f"sample.video={CLIP}",),
    "t2a": (),
    "t2av": (),
    "t2v": (),
    "v2a": (f"sample.video={CLIP}",),
    "v2v_ic": (f"sample.reference_video={CLIP}",),
}
MORE = {
    "av2av_ic": (f"sample.reference_audio={CLIP}", f"sample.reference_video={OTHER}"),
    "av_i2v": (f"sample.image={CLIP}",),
    "i2v": (f"sample.image={CLIP}",), "v2v_ic": (f"sample.image={CLIP}",), "id_lora": (f"sample.image={CLIP}",),
    "multi_reference_ic": (f"sample.reference_video={CLIP}", f"sample.references={{subject_video_latent: {OTHER}}}"),
    "t2v": (f"sample.frames={{0.4: {CLIP}}}",),
}  # fmt: skip


def composed(*words: str) -> Config:
    return config.compose_config([*BASE, *words])


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return encoder_builder.encoders(composed())


@pytest.fixture(scope="module", autouse=True)
def _half_white() -> Iterator[None]:
    """A mask that keeps the upper half."""
    picture = torch.zeros(33, 64, 64, 3, dtype=torch.uint8)
    picture[:, :32] = 255
    write_mp4(MASK, picture, None, 25.0)
    yield
    MASK.unlink()
    MASK.with_suffix(".jpg").unlink(missing_ok=True)


def given(encoders: Encoders, *words: str) -> GivenMedia:
    made = composed(*words)
    return given_media.of_clip(made, clip_inputs.of_clip(made), encoders)


def test_all_modes_are_here() -> None:
    assert set(NEEDS) == set(group_options()["mode"])


@pytest.mark.parametrize("mode", NEEDS)
def test_a_mode_refuses_what_it_lacks_and_names_all_of_it(mode: str) -> None:
    clip_inputs.of_clip(composed(f"mode={mode}", *NEEDS[mode]))
    for word in NEEDS[mode]:
        name = word.partition("=")[0]
        with pytest.raises(ConfigError, match=f"the mode needs .*{name}"):
            clip_inputs.of_clip(composed(f"mode={mode}", *(w for w in NEEDS[mode] if w != word)))


@pytest.mark.parametrize(
    ("mode", "word"),
    [
        ("t2v", f"sample.audio={CLIP}"), ("t2a", f"sample.video={CLIP}"), ("t2a", f"sample.image={CLIP}"),
        ("t2v", f"sample.reference_audio={CLIP}"), ("t2av", f"sample.reference_video={CLIP}"),
        ("extend", f"sample.mask={CLIP}"), ("t2av", "sample.region=[0,0,32,32]"), ("a2v", "sample.audio_mask='0-1'"),
        ("v2v_ic", f"sample.references={{other: {CLIP}}}"),
    ],
)  # fmt: skip
def test_a_mode_refuses_what_it_does_not_use(mode: str, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{word.partition('=')[0]}: not used by this mode|needs"):
        clip_inputs.of_clip(composed(f"mode={mode}", *NEEDS[mode], word))


def test_a_clip_of_which_all_is_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to generate"):
        clip_inputs.of_clip(composed("mode=t2av", f"sample.audio={CLIP}", f"sample.video={CLIP}"))
    with pytest.raises(ConfigError, match=r"sample\.strength=2\.5"):
        composed("sample.strength=2.5")


@pytest.mark.parametrize("frames", ["[a.png]", "{x: a.png}", "{-1: a.png}", "a.png"])
def test_frames_are_images_by_seconds(frames: str) -> None:
    with pytest.raises(ConfigError, match=r"sample\.frames: "):
        clip_inputs.of_clip(composed("mode=t2v", f"sample.frames={frames}"))


@pytest.mark.parametrize("mode", NEEDS)
def test_what_is_given_comes_out_as_it_went_in(mode: str, encoders: Encoders) -> None:
    """Through the sampler: clean target tokens are those of the files, the others are generated."""
    made = composed(f"mode={mode}", *NEEDS[mode], *MORE.get(mode, ()))
    request = requests.request(made, encoders, requests.contexts(made, encoders))
    batch = request.batch
    draws = conditions.draw(batch, request.mode, sigma.SigmaDistribution(), 0, sigma=1.0)
    inputs = conditions.assemble(batch, references.always_open(request.mode), draws)
    start = sampler.SamplerInputs(video=inputs.video, audio=inputs.audio)
    found = sampler.sample(load_transformer(TINY), start, sigma.inference_schedule(2), requests.guidance(made))
    latents = (batch.video_latent, batch.audio_latent)
    for modality, tokens, latent in zip((inputs.video, inputs.audio), found, latents, strict=True):
        if modality is None or tokens is None or latent is None:
            continue
        clean = modality.timesteps == 0
        assert torch.equal(tokens[clean], modality.latent[clean])
        assert bool(torch.isfinite(tokens).all())
        targets = references.tokens(latent)
        own = clean[:, : targets.shape[1]]
        assert torch.equal(tokens[:, : targets.shape[1]][own], targets[own]), "of the file"
        assert not bool((targets[own] == 0).all()) or not bool(own.any())
    if NEEDS[mode] or mode in MORE:
        given_tokens = sum(0 if m is None else int((m.timesteps == 0).sum()) for m in (inputs.video, inputs.audio))
        assert given_tokens > 0


def test_the_parts_of_a_video_are_where_they_belong(encoders: Encoders) -> None:
    """A prefix is the file's beginning; a suffix its end, without the first latent of its own encoding."""
    prefix = given(encoders, "mode=extend", f"sample.video={CLIP}", "mode.conditions.0.latents=[2]")
    suffix = given(encoders, "mode=suffix", f"sample.video={CLIP}", "mode.conditions.0.latents=[1]")
    whole = given(encoders, "mode=v2a", f"sample.video={CLIP}")
    assert whole.mode.video is Role.freeze
    torch.testing.assert_close(prefix.video[:, :, :2], whole.video[:, :, :2], atol=1e-4, rtol=1e-4)
    assert not bool(prefix.video[:, :, 2:].any())
    assert bool(suffix.video[:, :, -1].any())
    assert not bool(suffix.video[:, :, :-1].any())


def test_a_short_file_gives_a_short_prefix_or_is_refused(encoders: Encoders, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    write_mp4(film, torch.randint(0, 255, (9, 64, 64, 3), dtype=torch.uint8), None, 25.0)
    made = given(encoders, "mode=extend", f"sample.video={film}")
    assert [c.latents for c in made.mode.conditions] == [[2]], "nine frames are two latents"
    for words in (("mode=v2a",), ("mode=suffix", "mode.conditions.0.latents=[4]")):
        with pytest.raises(DataError, match=r"film\.mp4 has"):
            given(encoders, *words, f"sample.video={film}")
    write_mp4(tmp_path / "sound.mp4", None, Sound(torch.zeros(2, 48000), 48000), 25.0)
    with pytest.raises(DataError, match="has no pictures"):
        given(encoders, "mode=v2a", f"sample.video={tmp_path / 'sound.mp4'}")


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    """Half a second of a rising tone, shorter than the clip."""
    seconds = torch.arange(24000) / 48000
    path = tmp_path / "tone.mp4"
    waveform = (0.5 * torch.sin(440 * seconds * (1 + seconds)))[None].expand(2, -1)
    write_mp4(path, None, Sound(waveform, 48000, True), 25.0)
    return path


def test_a_sound_that_is_too_short_is_refused_looped_or_filled_up(encoders: Encoders, tone: Path) -> None:
    with pytest.raises(DataError, match=r"0\.50 s of sound from 0 s on, and 1\.32 s are needed.*loop or silence"):
        given(encoders, "mode=a2v", f"sample.audio={tone}")
    looped, filled = (
        given(encoders, "mode=a2v", f"sample.audio={tone}", f"sample.audio_short={how}").sound
        for how in ("loop", "silence")
    )
    assert looped is not None
    assert filled is not None
    assert looped.waveform.shape == filled.waveform.shape == (2, round(1.32 * 48000))
    period = round(probe(tone).seconds * 48000)
    torch.testing.assert_close(looped.waveform[:, period : 2 * period], looped.waveform[:, :period], atol=1e-6, rtol=0)
    assert not bool(filled.waveform[:, 24100:].any())
    later = given(encoders, "mode=a2v", f"sample.audio={CLIP}", "sample.audio_start=0.1").sound
    plain = given(encoders, "mode=a2v", f"sample.audio={CLIP}").sound
    assert later is not None
    assert plain is not None
    shift = round(0.1 * plain.rate)
    torch.testing.assert_close(later.waveform[:, :1000], plain.waveform[:, shift : shift + 1000], atol=1e-4, rtol=0)
    with pytest.raises(DataError, match=r"audio_start=9 is behind it"):
        given(encoders, "mode=a2v", f"sample.audio={CLIP}", "sample.audio_start=9")
    with pytest.raises(DataError, match=r"has 0\.30 s of sound"):
        given(encoders, "mode=a2v", f"sample.audio={CLIP}", "sample.audio_seconds=0.3")


def test_a_frame_at_a_time_stands_there_for_one_frame(encoders: Encoders) -> None:
    made = given(encoders, "mode=t2v", f"sample.frames={{0.4: {CLIP}, 0.2: {OTHER}}}")
    first, second = made.mode.conditions
    assert (first.at_s, second.at_s) == (0.2, 0.4)
    latent = made.references[second.name]
    bounds = references.bounds(second, latent, made.video, torch.tensor([25.0]))
    assert bounds[0, 0].unique().tolist() == pytest.approx([0.4, 0.44])
    target = positions.video(*made.video.shape[2:], 25.0)
    assert torch.equal(bounds[0, 1:], target[1:, : latent.shape[3] * latent.shape[4]])
    with pytest.raises(DataError, match="9 s is behind the clip's end"):
        given(encoders, "mode=t2v", f"sample.frames={{9: {CLIP}}}")


def test_images_are_compressed_as_training_videos_were(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    plain, compressed = (image_to_pixels(path, 64, 64, crf=crf) for crf in (0, 33))
    assert torch.equal(plain[0, :, 0], torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
    assert 0.1 < float((plain - compressed).abs().mean()) < 1


def test_a_given_sound_is_written_without_loss(tmp_path: Path) -> None:
    samples = torch.randint(-32768, 32767, (2, 9600)).float() / 32768
    write_mp4(tmp_path / "a.mp4", torch.zeros(5, 32, 32, 3, dtype=torch.uint8), Sound(samples, 48000, True), 25.0)
    again, rate = read_audio(tmp_path / "a.mp4")
    assert again is not None
    assert rate == 48000
    assert torch.equal(again[:, :9600], samples)


def test_a_frozen_modality_is_not_guided() -> None:
    """Its context stays the prompt's in the negative pass, and its self-attention is not skipped."""
    made = composed(
        "mode=a2v", f"sample.audio={CLIP}", "sample.video_cfg=3", "sample.audio_cfg=7", "sample.stg_scale=1",
        "sample.stg_blocks=[1]", "sample.modality_scale=3", "sample.rescale=0.7",
    )  # fmt: skip
    guidance = requests.guidance(made)
    assert (guidance.video.cfg, guidance.audio.cfg, guidance.audio.stg) == (3, 7, 1)
    seen: list[tuple[float, frozenset[int], frozenset[int]]] = []
    model = load_transformer(TINY)

    def watched(video, audio, perturbation):  # type: ignore[no-untyped-def]
        seen.append((float(audio.context.mean()), perturbation.skip_video, perturbation.skip_audio))
        return model(video, audio, perturbation)

    encoders = encoder_builder.encoders(made)
    request = requests.request(made, encoders, requests.contexts(made, encoders))
    batch = request.batch
    draws = conditions.draw(batch, request.mode, sigma.SigmaDistribution(), 0, sigma=1.0)
    inputs = conditions.assemble(batch, request.mode, draws)
    start = sampler.SamplerInputs(
        video=inputs.video, audio=inputs.audio, negative_video=torch.ones(1, 8, 64), negative_audio=torch.ones(1, 8, 32)
    )
    sampler.sample(watched, start, torch.tensor([1.0, 0.0]), guidance)  # type: ignore[arg-type]
    assert len(seen) == 4
    assert len({context for context, _, _ in seen}) == 1, "of the audio, also in the negative pass"
    assert {skip for _, skip, _ in seen} == {frozenset(), frozenset({1})}
    assert {skip for _, _, skip in seen} == {frozenset()}


@pytest.mark.slow
def test_the_command_makes_a_sound_for_a_video_and_follows_a_control(tmp_path: Path) -> None:
    out = [tmp_path / f"{n}.mp4" for n in range(3)]
    assert command("sample", *BASE, "mode=v2a", f"sample.video={CLIP}", f"sample.out={out[0]}") == 0
    for file, path in zip((CLIP, OTHER), out[1:], strict=True):
        assert command("sample", *BASE, "mode=v2v_ic", f"sample.reference_video={file}", f"sample.out={path}") == 0
    pictures = []
    for path in out:
        with av.open(str(path)) as container:
            pictures.append(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(int))
    assert read_audio(out[0])[0] is not None
    assert np.abs(pictures[1] - pictures[2]).mean() > 1, "another control, another clip"
    made = composed("mode=v2a", f"sample.video={CLIP}")
    encoders = encoder_builder.encoders(made)
    request = requests.request(made, encoders, requests.contexts(made, encoders))
    video, audio = requests.generate(load_transformer(TINY), made, request, torch.device("cpu"))
    assert request.batch.video_latent is not None
    assert video is not None
    assert torch.equal(video, request.batch.video_latent[0]), "the given video"
    assert audio is not None


def test_solvers_and_schedules(encoders: Encoders) -> None:
    """Both solvers reach the same end where the velocity does not change; Heun is of second order where it does."""
    made = composed("sample.schedule=distilled", "sample.solver=heun", "mode=t2a")
    assert len(requests.schedule(made)) == 9
    assert requests.schedule(made)[[0, 6, 7, 8]].tolist() == pytest.approx([1.0, 0.725, 0.421875, 0.0])
    assert requests.schedule(replace(made, sample=replace(made.sample, schedule="dev", steps=4))).shape == (5,)
    request = requests.request(made, encoders, requests.contexts(made, encoders))
    draws = conditions.draw(request.batch, request.mode, sigma.SigmaDistribution(), 0, sigma=1.0)
    inputs = conditions.assemble(request.batch, request.mode, draws)
    start = sampler.SamplerInputs(video=None, audio=inputs.audio)

    def bent(_video, audio, _what):  # type: ignore[no-untyped-def]
        return None, 2 * audio.latent * audio.sigma[:, None, None]

    exact = inputs.audio.latent * np.exp(-0.99)  # dx/ds = 2 x s from 1 to 0.1
    errors = {}
    for solver in sampler.Solver:
        for steps in (8, 16):
            levels = torch.linspace(1, 0.1, steps + 1)
            found = sampler.sample(bent, start, levels, requests.guidance(made), solver)[1]  # type: ignore[arg-type]
            errors[solver, steps] = float((found - exact).abs().mean())
    assert errors[sampler.Solver.euler, 8] / errors[sampler.Solver.euler, 16] == pytest.approx(2, rel=0.2)
    assert errors[sampler.Solver.heun, 8] / errors[sampler.Solver.heun, 16] == pytest.approx(4, rel=0.2)


def test_skipped_steps_repeat_the_prediction(encoders: Encoders) -> None:
    made = composed("mode=t2a", "sample.skip_steps=1")
    request = requests.request(made, encoders, requests.contexts(made, encoders))
    draws = conditions.draw(request.batch, request.mode, sigma.SigmaDistribution(), 0, sigma=1.0)
    inputs = conditions.assemble(request.batch, request.mode, draws)
    calls: list[float] = []

    def counted(_video, audio, _what):  # type: ignore[no-untyped-def]
        calls.append(float(audio.sigma))
        return None, audio.latent

    start = sampler.SamplerInputs(video=None, audio=inputs.audio)
    sampler.sample(counted, start, torch.linspace(1, 0, 7), requests.guidance(made))  # type: ignore[arg-type]
    assert calls == pytest.approx([1, 4 / 6, 2 / 6])


def test_conditions_of_a_mode_that_is_optional_are_left_out() -> None:
    made = clip_inputs.of_clip(composed("mode=v2v_ic", *NEEDS["v2v_ic"])).mode
    assert [c.kind for c in made.conditions] == [ConditionKind.reference]
    without = clip_inputs.of_clip(composed("mode=audio_reference", "sample.without_references=true")).mode
    assert without.conditions == []
    voice = clip_inputs.of_clip(composed("mode=t2av", f"sample.reference_audio={CLIP}")).mode
    assert [c.stream for c in voice.conditions] == [ModalityName.audio]
