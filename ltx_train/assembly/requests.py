"""From prompts, pictures and sounds to the tensors that a clip is generated from, and from those to its file.

`sample` and the clips that a run generates share it, so that all make the same clip of the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ltx_train import durable
from ltx_train.assembly import model_source
from ltx_train.config import Config, counted_fps, sample_bucket
from ltx_train.contracts import Batch, Clip, Condition, ConditionKind, DataError, ModalityName, Mode, Role
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.sound import read_audio
from ltx_train.data.reader import AUDIO_CONTEXT, VIDEO_CONTEXT
from ltx_train.diffusion import conditions, references, sigma, transfer
from ltx_train.model import codecs
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling import media, sampler
from ltx_train.sampling.guidance import Guidance
from ltx_train.sampling.media import Decoder, Sound


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """The tensors of a clip in host memory. negative: the text contexts that guidance moves away from. sound: the input
    audio in its original quality, for the file."""

    mode: Mode
    batch: Batch
    negative: Mapping[str, Tensor]
    sound: Sound | None
    fps: float


def contexts(config: Config, encoders: Encoders) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The text contexts of the prompt and of the negative prompt of `config.sample`."""
    return encoders.caption(config.sample.prompt), encoders.caption(config.sample.negative_prompt)


def request(config: Config, encoders: Encoders, texts: tuple[dict[str, Tensor], dict[str, Tensor]]) -> SampleRequest:
    """The request of `config.sample`. Its text encoder is not needed any more."""
    s, bucket = config.sample, sample_bucket(config)
    fps = s.fps or counted_fps(config)
    channels = model_source.weights(config).config["transformer"]
    latents = bucket.audio_tokens(fps)
    audio_shape = (1, channels["audio_in_channels"] // codecs.LATENT_MEL_BINS, latents, codecs.LATENT_MEL_BINS)
    video, audio = torch.zeros(1, channels["in_channels"], *bucket.latents), torch.zeros(audio_shape)
    mode = _mode(config)
    sound = reference = None
    if s.image is not None:
        pixels = media.image_to_pixels(s.image, bucket.width, bucket.height).to(encoders.video_vae.device)
        video[:, :, :1] = codecs.encode_video(encoders.video_vae, pixels).float().cpu()
    if s.audio is not None:
        sound = _sound(s.audio, bucket.frames / fps)
        audio = encoders.sound(sound.waveform, sound.rate)[None, :, :latents].cpu()
    if s.reference_audio is not None:
        reference = encoders.reference(Path(s.reference_audio), config.data.reference_s)[None].cpu()
    positive, negative = texts
    batch = Batch(
        keys=("sample",), speakers=("",), draws=(0,), fps=torch.tensor([fps]),
        video_latent=None if mode.video is Role.absent else video,
        audio_latent=None if mode.audio is Role.absent else audio,
        video_context=positive[VIDEO_CONTEXT][None].cpu(), audio_context=positive[AUDIO_CONTEXT][None].cpu(),
        references={} if reference is None else {_voice(config).name: reference},
    )  # fmt: skip
    return SampleRequest(
        mode=mode, batch=batch, negative={name: tensor[None].cpu() for name, tensor in negative.items()}, sound=sound,
        fps=fps,
    )  # fmt: skip


def of_batch(mode: Mode, batch: Batch, negative: Mapping[str, Tensor] | None, fps: float) -> SampleRequest:
    """The request of a prepared sample, with all its references. negative: contexts of a negative prompt (S, D), None
    where guidance needs none."""
    own = {VIDEO_CONTEXT: batch.video_context, AUDIO_CONTEXT: batch.audio_context}
    away = own if negative is None else {name: tensor[None] for name, tensor in negative.items()}
    return SampleRequest(mode=references.always_open(mode), batch=batch, negative=away, sound=None, fps=fps)


def generate(transformer: Transformer, config: Config, made: SampleRequest, device: torch.device) -> Pair:
    """The latents of the clip, (C, F, H, W) of the video and (c, T, f) of the sound; None for what is not generated or
    given."""
    batch = transfer.batch_to(made.batch, device)
    draws = conditions.draw(batch, made.mode, sigma.SigmaDistribution(), config.sample.seed, sigma=1.0)
    inputs = conditions.assemble(batch, references.always_open(made.mode), draws)
    start = sampler.SamplerInputs(
        video=inputs.video, audio=inputs.audio, negative_video=made.negative[VIDEO_CONTEXT].to(device),
        negative_audio=made.negative[AUDIO_CONTEXT].to(device), gates=references.gates(made.mode, batch),
    )  # fmt: skip
    levels = sigma.inference_schedule(config.sample.steps)
    video, audio = sampler.sample(transformer, start, levels, guidance(config))
    clip = sound = None
    if video is not None and batch.video_latent is not None:
        target = batch.video_latent[0, 0].numel()
        clip = codecs.video_grid(video[:, :target], *batch.video_latent.shape[2:])[0]
    if audio is not None and batch.audio_latent is not None and made.sound is None:
        sound = codecs.audio_grid(audio[:, : batch.audio_latent.shape[2]], batch.audio_latent.shape[1])[0]
    return clip, sound


def write(decoder: Decoder, made: SampleRequest, latents: Pair, path: Path) -> None:
    """Decodes a clip to an mp4 file; a given sound comes with it as it is. Its first picture lies beside it."""
    pixels, sound = media.decode(decoder, *latents)
    media.write_mp4(path, pixels, made.sound or sound, made.fps)
    if pixels is not None:
        durable.write(Clip("", path).poster, media.jpeg(pixels[0]))


def guidance(config: Config) -> Guidance:
    s = config.sample
    return Guidance(
        video_cfg=s.video_cfg, audio_cfg=s.audio_cfg, modality_scale=s.modality_scale, stg_scale=s.stg_scale,
        stg_blocks=tuple(s.stg_blocks), rescale=s.rescale,
    )  # fmt: skip


def _mode(config: Config) -> Mode:
    """The trained mode, with one condition for each input file."""
    active: list[Condition] = []
    if config.sample.image is not None:
        active.append(Condition(kind=ConditionKind.first_frame, p=1.0))
    if config.sample.reference_audio is not None:
        active.append(_voice(config))
    role = Role.freeze if config.sample.audio is not None else config.mode.audio
    return Mode(config.mode.video, role, config.mode.sigma, active)


def _voice(config: Config) -> Condition:
    """The voice reference of the trained mode, with probability 1."""
    voices = [c for c in config.mode.references if c.stream is ModalityName.audio]
    return replace(voices[0], p=1.0) if voices else Condition(kind=ConditionKind.reference)


def _sound(path: str, seconds: float) -> Sound:
    """The input audio, cut or padded to the length of the video. The output file gets it too."""
    waveform, rate = read_audio(Path(path), 0.0, seconds)
    if waveform is None:
        raise DataError(f"{path} has no sound")
    return Sound(waveform, rate)
