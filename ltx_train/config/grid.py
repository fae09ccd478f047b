"""Buckets: their spelling and the grid that the VAEs put on clips.

Numbers only; no torch.
"""

from __future__ import annotations

import re

from ltx_train.contracts import ConfigError

_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")
PIXELS_PER_LATENT = 32


def parse_bucket(text: str) -> tuple[int, int, int]:
    """`WxHxF` -> (width, height, frames); ConfigError when off the grid."""
    match = _BUCKET.fullmatch(text)
    if not match:
        raise ConfigError(f"data.buckets: {text!r} is not WIDTHxHEIGHTxFRAMES (as 512x512x121)")
    width, height, frames = (int(g) for g in match.groups())
    if width % 32 or height % 32 or not width or not height:
        raise ConfigError(f"data.buckets: {text!r}: width and height must be multiples of 32")
    if frames % 8 != 1:
        near = max(1, round((frames - 1) / 8) * 8 + 1)
        raise ConfigError(f"data.buckets: {text!r}: frames must be 8k + 1 (nearest: {near})")
    return width, height, frames


def video_latents(frames: int) -> int:
    """Latent frames of a clip of 8k + 1 frames."""
    return (frames - 1) // 8 + 1


def audio_latents(frames: int, fps: float) -> int:
    """Audio latents beside so many frames: 25 per second."""
    return round(frames / fps * 25)
