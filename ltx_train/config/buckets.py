"""Sizes and rates of training clips as the configuration spells them."""

from __future__ import annotations

import re

from ltx_train.config.schema import Config
from ltx_train.contracts import ConfigError
from ltx_train.diffusion.grid import FRAMES_PER_LATENT, PIXELS_PER_LATENT, Bucket

SOURCE = "source"
# What lengths are counted with before files with rates of their own are seen: the usual rate with the longest clips.
_USUAL_FPS = 24.0
_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")


def parse_bucket(text: str) -> Bucket:
    """`WIDTHxHEIGHTxFRAMES`; ConfigError when it is spelled otherwise or off the latent grid."""
    match = _BUCKET.fullmatch(text)
    if not match:
        raise ConfigError(f"data.buckets: {text!r} is not WIDTHxHEIGHTxFRAMES (as 512x512x121)")
    width, height, frames = (int(g) for g in match.groups())
    if width % PIXELS_PER_LATENT or height % PIXELS_PER_LATENT or not width or not height:
        raise ConfigError(f"data.buckets: {text!r}: width and height must be multiples of {PIXELS_PER_LATENT}")
    if frames % FRAMES_PER_LATENT != 1:
        near = max(1, round((frames - 1) / FRAMES_PER_LATENT) * FRAMES_PER_LATENT + 1)
        raise ConfigError(f"data.buckets: {text!r}: frames must be 8k + 1 (nearest: {near})")
    return Bucket(width, height, frames)


def fixed_fps(config: Config) -> float | None:
    """The rate that all clips are converted to; None: each clip keeps its own."""
    return None if config.data.fps == SOURCE else float(config.data.fps)


def counted_fps(config: Config) -> float:
    """The rate that plans and lengths are counted with."""
    return fixed_fps(config) or _USUAL_FPS


def sample_bucket(config: Config) -> Bucket:
    """The size of a generated clip."""
    return parse_bucket(config.sample.bucket or config.data.buckets[0])
