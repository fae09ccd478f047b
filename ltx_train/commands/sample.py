"""`ltx-train sample`: video with sound from text, a first frame, a reference voice or a given sound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.assembly import from_config, model_builder, model_source, resolve
from ltx_train.assembly.closing import close
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config, parse_bucket
from ltx_train.contracts import Batch, Condition, ConditionKind, DataError, Exit, ModalityName, Mode, Role
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.media import read_audio
from ltx_train.data.reader import AUDIO_CONTEXT, VIDEO_CONTEXT
from ltx_train.diffusion import conditions, references, sigma
from ltx_train.diffusion.grid import Bucket
from ltx_train.model import codecs, export, lora_file
from ltx_train.model.transformer import Transformer
from ltx_train.sampling import media, sampler
from ltx_train.sampling.guidance import Guidance
from ltx_train.sampling.media import Sound


@dataclass(frozen=True)
class SampleRequest:
    """What is asked for as tensors. sound: the given audio in its original quality, which the file gets."""

    mode: Mode
    batch: Batch
    negative: dict[str, Tensor]
    sound: Sound | None


def run(config: Config) -> int:
    """Writes sample.out. The encoders are freed before the transformer is loaded."""
    bucket = parse_bucket(config.sample.bucket or config.data.buckets[0])
    fps = config.sample.fps or config.data.fps
    given = _given(config, from_config.encoders(config), bucket, fps)
    transformer = _transformer(config)
    video, audio = sampler.sample(
        transformer, _start(config, given), sigma.inference_schedule(config.sample.steps), _guidance(config)
    )
    del transformer
    _write(config, given, video, audio, fps)
    return Exit.DONE


def _given(config: Config, encoders: Encoders, bucket: Bucket, fps: float) -> SampleRequest:
    s, device = config.sample, resolve.device(config)
    channels = model_source.weights(config).config["transformer"]
    latents = bucket.audio_tokens(fps)
    audio_shape = (1, channels["audio_in_channels"] // codecs.LATENT_MEL_BINS, latents, codecs.LATENT_MEL_BINS)
    positive, negative = encoders.caption(s.prompt), encoders.caption(s.negative_prompt)
    encoders.release_text()
    video = torch.zeros(1, channels["in_channels"], *bucket.latents)
    audio: Tensor | None = torch.zeros(audio_shape)
    mode = _mode(config)
    sound = reference = None
    if s.image is not None:
        pixels = media.image_to_pixels(s.image, bucket.width, bucket.height).to(device)
        video[:, :, :1] = codecs.encode_video(encoders.video_vae, pixels).float().cpu()
    if s.audio is not None:
        sound = _sound(s.audio, bucket.frames / fps)
        audio = encoders.sound(sound.waveform, sound.rate)[None, :, :latents]
    if s.reference_audio is not None:
        reference = encoders.reference(Path(s.reference_audio), config.data.reference_s)[None]
    batch = Batch(
        keys=("sample",), speakers=("",), draws=(0,), fps=torch.tensor([fps]),
        video_latent=None if mode.video is Role.absent else video.to(device),
        audio_latent=None if mode.audio is Role.absent else audio.to(device),
        video_context=positive[VIDEO_CONTEXT][None].to(device), audio_context=positive[AUDIO_CONTEXT][None].to(device),
        references={} if reference is None else {_voice(config).name: reference.to(device)},
    )  # fmt: skip
    return SampleRequest(mode, batch, {k: v[None].to(device) for k, v in negative.items()}, sound)


def _mode(config: Config) -> Mode:
    """The trained mode, with the conditions that the given files ask for."""
    asked: list[Condition] = []
    if config.sample.image is not None:
        asked.append(Condition(kind=ConditionKind.first_frame, p=1.0))
    if config.sample.reference_audio is not None:
        asked.append(_voice(config))
    role = Role.freeze if config.sample.audio is not None else config.mode.audio
    return Mode(config.mode.video, role, config.mode.sigma, asked)


def _voice(config: Config) -> Condition:
    """How a voice was given in training, now always."""
    voices = [c for c in config.mode.references if c.stream is ModalityName.audio]
    return replace(voices[0], p=1.0) if voices else Condition(kind=ConditionKind.reference)


def _start(config: Config, given: SampleRequest) -> sampler.SamplerInputs:
    draws = conditions.draw(given.batch, given.mode, sigma.SigmaDistribution(), config.sample.seed, sigma=1.0)
    inputs = conditions.assemble(given.batch, references.always_open(given.mode), draws)
    negative = given.negative
    gates = references.gates(given.mode, given.batch)
    return sampler.SamplerInputs(
        video=inputs.video,
        audio=inputs.audio,
        negative_video=negative[VIDEO_CONTEXT],
        negative_audio=negative[AUDIO_CONTEXT],
        gates=gates,
    )


def _guidance(config: Config) -> Guidance:
    s = config.sample
    return Guidance(
        video_cfg=s.video_cfg,
        audio_cfg=s.audio_cfg,
        modality_scale=s.modality_scale,
        stg_scale=s.stg_scale,
        stg_blocks=tuple(s.stg_blocks),
        rescale=s.rescale,
    )


def _transformer(config: Config) -> Transformer:
    buckets = [config.sample.bucket] if config.sample.bucket else config.data.buckets[:1]
    setup = forward_only(replace(config, data=replace(config.data, buckets=buckets)))
    transformer = model_builder.open_frozen(setup)
    if config.sample.adapter is not None:
        tensors, _ = lora_file.read_lora(config.sample.adapter)
        export.bind(transformer, tensors, config.sample.strength)
    return transformer.eval()


def _write(config: Config, given: SampleRequest, video: Tensor | None, audio: Tensor | None, fps: float) -> None:
    decoder = media.open_decoder(model_source.weights(config), resolve.device(config), from_config.dtype(config))
    video_latent, audio_latent = given.batch.video_latent, given.batch.audio_latent
    clip = speech = None
    if video is not None and video_latent is not None:
        clip = codecs.video_grid(video, *video_latent.shape[2:])[0]
    if audio is not None and audio_latent is not None and given.sound is None:
        speech = codecs.audio_grid(audio[:, : audio_latent.shape[2]], audio_latent.shape[1])[0]
    pixels, sound = media.decode(decoder, clip, speech)
    media.write_mp4(Path(config.sample.out), pixels, given.sound or sound, fps)
    close(config.sample.out, "ltx-train sample ... sample.seed=43 (another one)")


def _sound(path: str, seconds: float) -> Sound:
    """A given sound, cut or padded to the video's length; it is also what the file gets."""
    waveform, rate = read_audio(Path(path), 0.0, seconds)
    if waveform is None:
        raise DataError(f"{path} has no sound")
    return Sound(waveform, rate)
