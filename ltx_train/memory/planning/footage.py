"""What a data set of many clips takes: bytes on disk, hours of preparation. Pure.

Owns the rates, which were measured on one H200 (docs/performance/encoders.json): other cards need more time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_train.diffusion.grid import Bucket, audio_latents
from ltx_train.model.codecs import LATENT_MEL_BINS

# Seconds for a pixel of a frame: 0.873 s a clip at 1280x704x153, decoding and writing included; and for a caption.
_PIXEL_S, _CAPTION_S = 0.873 / (1280 * 704 * 153), 0.082
_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSizes:
    """Channels of the latents, width of both text contexts together, tokens of a context, bytes of a stored number."""

    video_channels: int
    audio_channels: int
    context_width: int
    context_tokens: int
    latent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footage:
    """Of one clip: sample_bytes in a shard, context_bytes of a caption; prepare_s on one H200, its caption included."""

    sample_bytes: int
    context_bytes: int
    prepare_s: float

    def hours(self, clips: int, captions: int, devices: int = 1) -> float:
        """Of `devices` H200s."""
        return (clips * (self.prepare_s - _CAPTION_S) + captions * _CAPTION_S) / 3600 / devices


def of_clip(sizes: StoredSizes, bucket: Bucket, fps: float, reference_s: float) -> Footage:
    """A clip with sound: its latents and its voice window, without the headers of a few hundred bytes."""
    sounds = audio_latents(bucket.frames / fps) + audio_latents(reference_s)
    sound = sizes.audio_channels * sounds * LATENT_MEL_BINS * _FLOAT32
    return Footage(
        sample_bytes=sizes.video_channels * bucket.video_tokens * sizes.latent_bytes + sound,
        context_bytes=sizes.context_tokens * sizes.context_width * sizes.latent_bytes,
        prepare_s=_PIXEL_S * bucket.width * bucket.height * bucket.frames + _CAPTION_S,
    )
