"""The encoders of a checkpoint: they turn a clip into latents and a caption into text contexts.

Owns the content of a sample's tensors and the fingerprints that the tensors depend on. It knows no folders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.data.prepare import extras, voices
from ltx_train.data.prepare.media import Media, Part
from ltx_train.data.prepare.sound import loudest, read_audio
from ltx_train.data.prepare.sources import Clip
from ltx_train.data.reader import (
    AUDIO,
    AUDIO_CONTEXT,
    AUDIO_MASK,
    CONTROL,
    FACE_MASK,
    REFERENCE,
    VIDEO,
    VIDEO_CONTEXT,
    VIDEO_MASK,
    VOICE,
    variant_of,
)
from ltx_train.diffusion.grid import audio_latents
from ltx_train.model import codecs, loaders, text
from ltx_train.model.checkpoint import TensorSource

_SILENT_DB = -120.0
_WIDEST_STAND_IN = 1024


@dataclass(frozen=True, slots=True)
class EncodedClip:
    """A clip's tensors by name, and the loudness of its sound in dB of full scale."""

    tensors: dict[str, Tensor]
    rms_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VoiceWindows:
    """What is encoded of a voice: its loudest `seconds`, and these variants of them. key: keys their random numbers."""

    seconds: float
    variants: tuple[str, ...] = ()
    key: str = ""


class Encoders:
    """The checkpoint's encoders on one device, each loaded on first use.

    A preparation without new clips or captions loads none. The text encoder and the VAEs need not share a GPU's
    memory: `release_text` frees the former. streams_text: as in `memory.planning.encoding`; tile: the edge of the video
    VAE's tiles. The constructor raises DataError when a real model has no text encoder and `with_text` is set.
    """

    def __init__(
        self, source: TensorSource, *, text_encoder: str | None, text_tokens: int, device: torch.device,
        dtype: torch.dtype, latent_dtype: torch.dtype, streams_text: bool = False,
        tile: int | None = None, with_text: bool = True,
    ) -> None:  # fmt: skip
        self._source, self._device, self._dtype = source, device, dtype
        self._streams_text, self._tile = streams_text, tile
        self._text = (text_encoder, text_tokens)
        self._width: int = source.config["transformer"]["caption_channels"]
        self.latent_dtype = latent_dtype
        if with_text and text_encoder is None and self._width > _WIDEST_STAND_IN:
            raise DataError("captions need a text encoder: set model.text_encoder to a local Gemma folder")
        self.fingerprints = encoder_fingerprints(source, text_encoder, text_tokens)

    @cached_property
    def video_vae(self) -> Any:
        return loaders.load_video_vae(self._source, device=self._device, dtype=self._dtype, tile=self._tile)

    @cached_property
    def audio_vae(self) -> Any:
        return loaders.load_audio_vae(self._source, device=self._device)

    @cached_property
    def connectors(self) -> Any:
        return loaders.load_text_connectors(self._source, device=self._device, dtype=self._dtype)

    @cached_property
    def text_encoder(self) -> text.TextEncoder:
        """Gemma from its folder, or the stand-in encoder of a model that is too small to have a text encoder."""
        path, tokens = self._text
        if path is not None:
            return text.GemmaEncoder(
                path, device=str(self._device), dtype=self._dtype, tokens=tokens, streamed=self._streams_text
            )
        return text.StandInEncoder(self._width, loaders.text_hidden_states(self._source), tokens)

    def release_text(self) -> None:
        """Frees the text encoder and the connectors, which on the real model are larger than the VAEs."""
        for name in ("text_encoder", "connectors"):
            self.__dict__.pop(name, None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def clip(self, media: Media, part: Part, reference: Path | None, voice: VoiceWindows) -> EncodedClip:
        """Encodes the video; the audio, cut to 25 latents per second; a voice window, which other clips use as their
        reference; and the file `reference`, if the clip has one."""
        tensors = {} if media.pixels is None else {VIDEO: self._encode_pixels(media.pixels)}
        loudness = _SILENT_DB
        if media.waveform is not None:
            tensors[AUDIO] = self.sound(media.waveform, media.rate)[:, : audio_latents(part.seconds)]
            window = loudest_window(media.waveform, media.rate, voice.seconds)
            if window is not None:
                tensors |= self._voices(VOICE, window, media.rate, voice)
            loudness = rms_db(media.waveform)
        if reference is not None:
            tensors |= self._voices(REFERENCE, *_window_of(reference, voice.seconds), voice)
        return EncodedClip({k: v.contiguous() for k, v in tensors.items()}, loudness)

    @torch.no_grad()
    def beside(self, part: Part, clip: Clip, grid: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
        """A clip's control video latents and masks, as far as it has them, by their tensor names in the shards.

        grid: how many times smaller the control video is, and every how many frames one is taken. size: width and
        height of the clip's upright pictures.
        """
        tensors: dict[str, Tensor] = {}
        if "reference_video" in clip.files:
            pixels = extras.control(clip.files["reference_video"], part, *grid)
            tensors[CONTROL] = self._encode_pixels(pixels)
        if "mask" in clip.files:
            tensors[VIDEO_MASK] = extras.video_mask(clip.files["mask"], part).contiguous()
        if clip.face is not None and clip.video is not None:
            tensors[FACE_MASK] = extras.face_mask(part, size).contiguous()
        if clip.audio_mask:
            latents = part.bucket.audio_tokens(part.fps)
            tensors[AUDIO_MASK] = extras.audio_mask(clip.audio_mask, latents, clip.key)
        return tensors

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (F, H, W, 3) uint8 -> latents (C, F', H', W') in `latent_dtype`, on the CPU."""
        vae = self.video_vae
        return (
            codecs.encode_video(vae, codecs.scaled(pixels, vae.device, vae.dtype))[0]
            .to(self.latent_dtype)
            .cpu()
            .contiguous()
        )

    @torch.no_grad()
    def caption(self, caption: str) -> dict[str, Tensor]:
        video, audio = text.contexts(self.text_encoder, self.connectors, caption)
        return {
            VIDEO_CONTEXT: video.to(self.latent_dtype).cpu().contiguous(),
            AUDIO_CONTEXT: audio.to(self.latent_dtype).cpu().contiguous(),
        }

    @torch.no_grad()
    def sound(self, waveform: Tensor, rate: int) -> Tensor:
        """Waveform (channels, samples) -> audio latents (c, T, 16), float32 on the CPU.

        T may exceed the number of latents that inference generates for the same duration by one; `clip` cuts the
        last latent off.
        """
        return codecs.encode_audio(self.audio_vae, waveform[None], rate)[0].float().cpu()

    def reference(self, path: Path, seconds: float) -> Tensor:
        """Reference latents of the loudest `seconds` of a file. DataError when the file's sound is shorter."""
        return self.sound(*_window_of(path, seconds))

    def _voices(self, name: str, window: Tensor, rate: int, voice: VoiceWindows) -> dict[str, Tensor]:
        """Latents of a voice window and of its variants, by their tensor names."""
        made = {name: self.sound(window, rate)}
        for variant in voice.variants:
            made[variant_of(name, variant)] = self.sound(voices.changed(variant, window, rate, voice.key), rate)
        return made


def _window_of(path: Path, seconds: float) -> tuple[Tensor, int]:
    """The loudest `seconds` of a file and their rate; DataError when the file's sound is shorter."""
    waveform, rate = read_audio(path)
    window = None if waveform is None else loudest_window(waveform, rate, seconds)
    if window is None:
        raise DataError(f"{path} has less than {seconds:g} s of sound: give a longer file, or lower data.reference_s")
    return window, rate


def encoder_fingerprints(source: TensorSource, text_encoder: str | None, tokens: int) -> dict[str, str]:
    """Fingerprints of the encoders that prepared tensors depend on, by name; cheap enough to compute at every start."""
    projection = ("text_embedding_projection.", "model.diffusion_model.video_embeddings_connector.")
    name = "stand-in" if text_encoder is None else text.gemma_fingerprint(text_encoder)
    return {
        "video VAE": source.fingerprint("vae."),
        "audio VAE": source.fingerprint("audio_vae."),
        "text connectors": source.fingerprint(*projection, "model.diffusion_model.audio_embeddings_connector."),
        "text encoder": f"{name}:{tokens}",
    }


def rms_db(waveform: Tensor) -> float:
    """Loudness in dB of full scale, -120 for silence."""
    power = float(waveform.double().square().mean())
    return max(_SILENT_DB, 10 * math.log10(power)) if power > 0 else _SILENT_DB


def loudest_window(waveform: Tensor, rate: int, seconds: float) -> Tensor | None:
    """The loudest `seconds` of a waveform (channels, samples), to get speech, not a pause. None if it is shorter."""
    best = loudest(waveform, rate, seconds)
    return None if best is None else waveform[:, best : best + round(seconds * rate)]
