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
from ltx_train.assembly import given_media
from ltx_train.config import Config, clip_inputs, counted_fps
from ltx_train.contracts import Batch, Clip, Modality, Mode, Role
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.reader import AUDIO_CONTEXT, VIDEO_CONTEXT
from ltx_train.diffusion import conditions, references, sigma, transfer
from ltx_train.model import codecs
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling import media, sampler
from ltx_train.sampling.guidance import Guidance, Guider
from ltx_train.sampling.media import Decoder, Sound
from ltx_train.sampling.sampler import Solver


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
    given = given_media.of_clip(config, clip_inputs.of_clip(config), encoders)
    fps = config.sample.fps or counted_fps(config)
    positive, negative = texts
    mode = given.mode
    batch = Batch(
        keys=("sample",), speakers=("",), draws=(0,), fps=torch.tensor([fps]),
        video_latent=None if mode.video is Role.absent else given.video,
        audio_latent=None if mode.audio is Role.absent else given.audio,
        video_context=positive[VIDEO_CONTEXT][None].cpu(), audio_context=positive[AUDIO_CONTEXT][None].cpu(),
        references=given.references, masks=given.masks,
    )  # fmt: skip
    away = {name: tensor[None].cpu() for name, tensor in negative.items()}
    return SampleRequest(mode=mode, batch=batch, negative=away, sound=given.sound, fps=fps)


def of_batch(mode: Mode, batch: Batch, negative: Mapping[str, Tensor] | None, fps: float) -> SampleRequest:
    """The request of a prepared sample, with all its references. negative: contexts of a negative prompt (S, D), None
    where guidance needs none."""
    own = {VIDEO_CONTEXT: batch.video_context, AUDIO_CONTEXT: batch.audio_context}
    away = own if negative is None else {name: tensor[None] for name, tensor in negative.items()}
    return SampleRequest(mode=references.always_open(mode), batch=batch, negative=away, sound=None, fps=fps)


def generate(transformer: Transformer, config: Config, made: SampleRequest, device: torch.device) -> Pair:
    """The latents of the clip, (C, F, H, W) of the video and (c, T, f) of the sound; None for what is not generated or
    given."""
    how = Denoising(
        seed=config.sample.seed, sigmas=schedule(config), guidance=guidance(config), solver=Solver(config.sample.solver)
    )
    return denoise(transformer, made, how, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoising:
    """seed: of the noise. sigmas: noise levels, the first of which the clip begins at, down to 0."""

    seed: int
    sigmas: Tensor
    guidance: Guidance
    solver: Solver


def denoise(
    transformer: Transformer, made: SampleRequest, how: Denoising, device: torch.device, begun: Pair = (None, None)
) -> Pair:
    """As `generate`. begun: latents (C, F, H, W) and (c, T, f) that the noise of the first level is added to, in the
    place of what is generated."""
    batch = transfer.batch_to(made.batch, device)
    level = float(how.sigmas[0])
    draws = conditions.draw(batch, made.mode, sigma.SigmaDistribution(), how.seed, sigma=level)
    inputs = conditions.assemble(batch, references.always_open(made.mode), draws)
    start = sampler.SamplerInputs(
        video=_begun(inputs.video, batch.video_latent, begun[0], level),
        audio=_begun(inputs.audio, batch.audio_latent, begun[1], level),
        negative_video=made.negative[VIDEO_CONTEXT].to(device),
        negative_audio=made.negative[AUDIO_CONTEXT].to(device), gates=references.gates(made.mode, batch),
    )  # fmt: skip
    video, audio = sampler.sample(transformer, start, how.sigmas, how.guidance, how.solver)
    clip = sound = None
    if video is not None and batch.video_latent is not None:
        target = batch.video_latent[0, 0].numel()
        clip = codecs.video_grid(video[:, :target], *batch.video_latent.shape[2:])[0]
    if audio is not None and batch.audio_latent is not None and made.sound is None:
        sound = codecs.audio_grid(audio[:, : batch.audio_latent.shape[2]], batch.audio_latent.shape[1])[0]
    return clip, sound


def _begun(modality: Modality | None, requested: Tensor | None, begun: Tensor | None, level: float) -> Modality | None:
    """The sampler's input: noised tokens at timestep 1, with what was begun beneath their noise. Tokens that are given
    clean stay as requested."""
    if modality is None or requested is None:
        return None
    noised = (modality.timesteps > 0).float()
    latent = modality.latent
    if begun is not None:
        beneath = references.tokens(begun[None].to(latent.device)) - references.tokens(requested)
        change = torch.nn.functional.pad(beneath, (0, 0, 0, latent.shape[1] - beneath.shape[1]))
        latent = latent + (1 - level) * change * noised[..., None]
    return replace(modality, latent=latent, timesteps=noised)


def write(decoder: Decoder, made: SampleRequest, latents: Pair, path: Path) -> None:
    """Decodes a clip to an mp4 file; a given sound comes with it as it is. Its first picture lies beside it."""
    pixels, sound = media.decode(decoder, *latents)
    media.write_mp4(path, pixels, made.sound or sound, made.fps)
    if pixels is not None:
        durable.write(Clip("", path).poster, media.jpeg(pixels[0]))


def guidance(config: Config) -> Guidance:
    """The guiders of both modalities. What is not set for the audio is as for the video, but for cfg."""
    s, blocks = config.sample, tuple(config.sample.stg_blocks)
    common = {"stg": s.stg_scale, "modality": s.modality_scale, "rescale": s.rescale}
    own = {"stg": s.audio_stg_scale, "modality": s.audio_modality_scale, "rescale": s.audio_rescale}
    audio = {**common, **{name: value for name, value in own.items() if value is not None}}
    return Guidance(
        video=Guider(cfg=s.video_cfg, blocks=blocks, **common), audio=Guider(cfg=s.audio_cfg, blocks=blocks, **audio),
        skip=s.skip_steps,
    )  # fmt: skip


def schedule(config: Config) -> Tensor:
    """The noise levels of a generation, from 1 to 0."""
    if config.sample.schedule == "distilled":
        return sigma.distilled_schedule()
    return sigma.inference_schedule(config.sample.steps)
