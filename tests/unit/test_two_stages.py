"""A generation in two stages: the upsampler as diffusers runs it, the start of the second stage, and its rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from safetensors.torch import load_file, save_file

from ltx_train import config
from ltx_train.assembly import second_stage
from ltx_train.assembly.requests import SampleRequest
from ltx_train.config import Config, two_stages
from ltx_train.contracts import Batch, Condition, ConditionKind, ConfigError, DataError, Mode, Role
from ltx_train.data.reader import AUDIO_CONTEXT, VIDEO_CONTEXT
from ltx_train.diffusion import conditions, references, sigma
from ltx_train.model import adapter, codecs, export, lora_file, upsampler
from ltx_train.model.adapter import Lora
from ltx_train.model.checkpoint import open_source
from ltx_train.model.loaders import build_transformer, load_video_vae
from ltx_train.model.transformer import Transformer
from tests.conftest import REPOSITORY, TINY, command, cut

CLIP = REPOSITORY / "data/sample/speaker01_0.mp4"
CPU = torch.device("cpu")
CHANNELS: int = open_source(TINY).config["transformer"]["in_channels"]


def network(path: Path, **changed: Any) -> LTX2LatentUpsamplerModel:
    """A small upsampler with random weights, in a file."""
    torch.manual_seed(0)
    sizes = {"in_channels": CHANNELS, "mid_channels": 32, "num_blocks_per_stage": 2, **changed}
    made = LTX2LatentUpsamplerModel(**sizes).requires_grad_(False)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, path)
    return made


def written(tmp_path: Path, **changed: Any) -> Path:
    path = tmp_path / "upsampler.safetensors"
    network(path, **changed)
    return path


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLLTX2Video:
    return load_video_vae(TINY)


@pytest.mark.parametrize("changed", [{}, {"use_rational_resampler": False}, {"dims": 2}])
def test_latents_are_doubled_as_by_diffusers(
    changed: dict[str, Any], vae: AutoencoderKLLTX2Video, tmp_path: Path
) -> None:
    path = tmp_path / "upsampler.safetensors"
    pipeline = LTX2LatentUpsamplePipeline(vae, network(path, **changed))
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, CHANNELS, 2, 2, 4)
    # It denormalizes what it is given, and returns latents that are not normalized.
    theirs = pipeline(
        latents=latents, latents_normalized=True, height=64, width=128, num_frames=9, output_type="latent",
        return_dict=False,
    )[0]  # fmt: skip
    loaded = upsampler.load(path, device=CPU, dtype=torch.float32)
    ours = upsampler.doubled(loaded, latents[0], open_source(TINY))
    assert ours.shape == (CHANNELS, 2, 4, 8)
    mean, std = (t.view(-1, 1, 1, 1) for t in (vae.latents_mean, vae.latents_std))
    torch.testing.assert_close(ours * std + mean, theirs[0], atol=1e-5, rtol=1e-5)


def test_the_constant_of_the_resampler_may_be_left_out(tmp_path: Path) -> None:
    path = written(tmp_path)
    tensors = load_file(path)
    kernel = tensors.pop("upsampler.blur_down.kernel")
    save_file(tensors, path)
    latents = torch.randn(CHANNELS, 1, 2, 2)
    without = upsampler.load(path, device=CPU, dtype=torch.float32)
    save_file({**tensors, "upsampler.blur_down.kernel": kernel}, path)
    whole = upsampler.load(path, device=CPU, dtype=torch.float32)
    assert torch.equal(*(upsampler.doubled(n, latents, open_source(TINY)) for n in (without, whole)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "no latent upsampler: it lacks initial_conv"),
        (lambda t: {n: v for n, v in t.items() if not n.startswith("upsampler")}, "lacks upsampler"),
        (lambda t: {n: v for n, v in t.items() if n != "final_conv.bias"}, r"1 tensors do not fit \(first: final_conv"),
        (lambda t: {**t, "final_conv.bias": torch.zeros(3)}, "do not fit"),
        (lambda t: {**t, "upsampler.conv.weight": torch.zeros(288, 32, 3, 3)}, "does not double width and height"),
        (lambda t: {**t, "upsampler.conv.weight": torch.zeros(64, 32, 3, 3, 3)}, "does not double width and height"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_spatial_upsampler_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    save_file(change(load_file(path)) or {"other": torch.zeros(1)}, path)
    with pytest.raises(DataError, match=message):
        upsampler.load(path, device=CPU, dtype=torch.float32)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(DataError, match="not a readable"):
        upsampler.load(path, device=CPU, dtype=torch.float32)


def requested(mode: Mode, video: torch.Tensor, audio: torch.Tensor) -> SampleRequest:
    text = {VIDEO_CONTEXT: torch.randn(1, 8, 64), AUDIO_CONTEXT: torch.randn(1, 8, 32)}
    batch = Batch(
        keys=("sample",), speakers=("",), draws=(0,), fps=torch.tensor([25.0]), video_latent=video, audio_latent=audio,
        video_context=text[VIDEO_CONTEXT], audio_context=text[AUDIO_CONTEXT],
    )  # fmt: skip
    return SampleRequest(mode=mode, batch=batch, negative=text, sound=None, fps=25.0)


class Remembering(Transformer):
    """Predicts that everything is noise, and remembers its first inputs."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.seen: list[Any] = []

    def forward(self, video: Any, audio: Any, perturbation: Any) -> Any:
        self.seen.append((video, audio))
        return tuple(None if m is None else torch.zeros_like(m.latent) for m in (video, audio))


def composed(*words: str) -> Config:
    return config.compose_config([f"model.path={TINY}", "mode=t2av", "data.buckets=[128x64x9]", *words])


def test_the_second_stage_begins_with_the_first_one_under_other_noise() -> None:
    """Noised tokens hold (1 - s) x + s n of the first level; the given first frame stays as it was requested."""
    given = torch.randn(1, CHANNELS, 2, 2, 4)
    mode = Mode(conditions=[Condition(kind=ConditionKind.first_frame, p=1.0)])
    audio = torch.zeros(1, 8, 9, 16)
    made = requested(mode, given, audio)
    begun = (torch.randn(CHANNELS, 2, 2, 4), torch.randn(8, 9, 16))
    model = Remembering()
    out = second_stage.refine(model, composed(), made, begun, CPU)
    level = float(sigma.refining_schedule()[0])
    assert len(model.seen) == 3
    video, sound = model.seen[0]
    again = replace(made.batch, draws=(1,))
    noise = conditions.draw(again, mode, sigma.SigmaDistribution(), composed().sample.seed, sigma=1.0)
    assert noise.video_noise is not None
    assert noise.audio_noise is not None
    expected = (1 - level) * references.tokens(begun[0][None]) + level * noise.video_noise
    torch.testing.assert_close(video.latent[:, 8:], expected[:, 8:], atol=1e-5, rtol=1e-5)
    assert torch.equal(video.latent[:, :8], references.tokens(given)[:, :8])
    torch.testing.assert_close(
        sound.latent, (1 - level) * references.tokens(begun[1][None]) + level * noise.audio_noise, atol=1e-5, rtol=1e-5
    )
    assert set(video.timesteps.unique().tolist()) == {0.0, level}
    assert out[0] is not None
    torch.testing.assert_close(references.tokens(out[0][None]), video.latent, atol=1e-5, rtol=1e-5)
    first = conditions.draw(made.batch, mode, sigma.SigmaDistribution(), composed().sample.seed, sigma=1.0)
    assert first.audio_noise is not None
    assert not torch.equal(first.audio_noise, noise.audio_noise)


def test_a_given_sound_stays_in_the_second_stage() -> None:
    audio = torch.randn(1, 8, 9, 16)
    made = requested(Mode(audio=Role.freeze), torch.zeros(1, CHANNELS, 2, 2, 4), audio)
    model = Remembering()
    second_stage.refine(model, composed(), made, (torch.randn(CHANNELS, 2, 2, 4), None), CPU)
    assert torch.equal(model.seen[0][1].latent, references.tokens(audio))


def test_a_smaller_control_video_needs_larger_steps() -> None:
    words = ("mode=v2v_ic", "data.reference_scale=2", "sample.upsampler=x", "sample.schedule=distilled")
    two_stages.check(composed(*words, "data.buckets=[256x128x9]"))
    with pytest.raises(ConfigError, match="multiples of 128"):
        two_stages.check(composed(*words, "data.buckets=[192x128x9]"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample.distilled_lora=x.safetensors",), r"set sample\.upsampler, too"),
        (("sample.upsampler=x",), r"set sample\.distilled_lora, or sample\.schedule=distilled"),
        (("sample.upsampler=x", "sample.schedule=distilled", "sample.bucket=96x64x9"), "multiples of 64"),
        (("sample.upsampler=x", "sample.schedule=distilled", "mode=t2a"), "generated whole"),
        (("sample.upsampler=x", "sample.schedule=distilled", "mode=v2a", f"sample.video={CLIP}"), "generated whole"),
        (("sample.upsampler=x", "sample.distilled_lora=y", "model.merge=z"), "both be merged"),
    ],
)
def test_what_two_stages_cannot_be_made_of_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two_stages.check(composed(*words))


def test_other_commands_have_one_stage_and_missing_files_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", "experiment=tiny_base", f"model.path={TINY}", f"sample.upsampler={TINY}") == 77
    assert "generates clips in one stage" in capsys.readouterr().err
    assert command("plan", "experiment=tiny_base", f"sample.upsampler={TINY}", "plan.card=H200") == 0
    capsys.readouterr()
    assert command(
        "sample", "mode=t2av", f"model.path={TINY}", "data.buckets=[64x64x9]", "sample.upsampler=absent",
        "sample.schedule=distilled",
    ) == 78  # fmt: skip
    assert "sample.upsampler=absent: there is no such file" in capsys.readouterr().err


def test_the_first_stage_has_half_the_size_and_the_second_the_distilled_lora() -> None:
    made = composed("sample.upsampler=x", "sample.distilled_lora=y", "sample.distilled_strength=0.5")
    assert two_stages.first_stage(made).sample.bucket == "64x32x9"
    merged = two_stages.second_stage(made).model
    assert (merged.merge, merged.merge_strength) == ("y", 0.5)
    assert two_stages.first_stage(composed()) == composed()


@pytest.mark.slow
def test_a_clip_in_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command: the file has the clip's size, and the distilled LoRA changes it."""
    network_file, lora = written(tmp_path), tmp_path / "distilled.safetensors"
    parameters = _random_lora(lora)
    began: list[tuple[int, ...]] = []
    true = codecs.decode_video
    monkeypatch.setattr(codecs, "decode_video", lambda vae, z: began.append(tuple(z.shape)) or true(vae, z))
    base = [
        "experiment=audio_reference", f"model.path={cut(1)}", "memory=none", "mode=av_i2v", "data.buckets=[128x64x9]",
        "sample.steps=2", f"sample.image={CLIP}", f"sample.upsampler={network_file}",
    ]  # fmt: skip
    found: dict[str, bytes] = {}
    for name, words in {"lora": [f"sample.distilled_lora={lora}"], "plain": ["sample.schedule=distilled"]}.items():
        out = tmp_path / f"{name}.mp4"
        assert command("sample", *base, *words, f"sample.out={out}") == 0
        with av.open(str(out)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 9
        assert frames[0].shape == (64, 128, 3)
        found[name] = frames[-1].tobytes()
    assert began == [(1, CHANNELS, 2, 2, 4)] * 2
    assert parameters
    assert found["lora"] != found["plain"]


def _random_lora(path: Path) -> int:
    """A LoRA of the video's self-attention with changes that are easily seen."""
    model = build_transformer(open_source(cut(1))).to_empty(device="cpu")
    lora = Lora(rank=2, alpha=2, dropout=0.0, targets=("attn1.to_v",))
    adapter.attach(model, lora, seed=0)
    parameters = adapter.lora_parameters(model)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter)
    export.write(path, export.lora_tensors(parameters, lora, torch.float32), {})
    return len(lora_file.read_lora(path)[0])
