"""`ltx-train sample`: video with sound from text, a first frame, a reference voice or an audio file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.assembly import encoder_builder, model_builder, model_source, outputs, resolve
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config, counted_fps, sample_bucket
from ltx_train.contracts import Batch, Condition, ConditionKind, DataError, Exit, ModalityName, Mode, Role
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.sound import read_audio
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
    """The tensors of a request. sound: the input audio in its original quality, for the output file."""

    mode: Mode
    batch: Batch
    negative: dict[str, Tensor]
    sound: Sound | None


def run(config: Config) -> int:
    """Writes sample.out. The encoders are freed before the transformer is loaded."""
    outputs.check_output(config, "sample.out", config.sample.out)
    bucket = sample_bucket(config)
    fps = config.sample.fps or counted_fps(config)
    request = _request(config, encoder_builder.encoders(config, bucket=bucket), bucket, fps)
    transformer = _transformer(config)
    video, audio = sampler.sample(
        transformer, _start(config, request), sigma.inference_schedule(config.sample.steps), _guidance(config)
    )
    del transformer
    _write(config, request, video, audio, fps)
    return Exit.DONE


def _request(config: Config, encoders: Encoders, bucket: Bucket, fps: float) -> SampleRequest:
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


def _start(config: Config, request: SampleRequest) -> sampler.SamplerInputs:
    draws = conditions.draw(request.batch, request.mode, sigma.SigmaDistribution(), config.sample.seed, sigma=1.0)
    inputs = conditions.assemble(request.batch, references.always_open(request.mode), draws)
    negative = request.negative
    gates = references.gates(request.mode, request.batch)
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


def _write(config: Config, request: SampleRequest, video: Tensor | None, audio: Tensor | None, fps: float) -> None:
    decoder = encoder_builder.decoder(config, resolve.device(config), sample_bucket(config))
    video_latent, audio_latent = request.batch.video_latent, request.batch.audio_latent
    clip = speech = None
    if video is not None and video_latent is not None:
        clip = codecs.video_grid(video, *video_latent.shape[2:])[0]
    if audio is not None and audio_latent is not None and request.sound is None:
        speech = codecs.audio_grid(audio[:, : audio_latent.shape[2]], audio_latent.shape[1])[0]
    pixels, sound = media.decode(decoder, clip, speech)
    media.write_mp4(Path(config.sample.out), pixels, request.sound or sound, fps)
    close(config.sample.out, sample_command(config.sample.adapter, f"sample.seed={config.sample.seed + 1}"))


def _sound(path: str, seconds: float) -> Sound:
    """The input audio, cut or padded to the length of the video. The output file gets it too."""
    waveform, rate = read_audio(Path(path), 0.0, seconds)
    if waveform is None:
        raise DataError(f"{path} has no sound")
    return Sound(waveform, rate)
