"""Rules of a generation in two stages: what it needs, and the settings of each stage.

The first stage makes the clip at half width and height. The second refines it at the size of the clip.
"""

from __future__ import annotations

from dataclasses import replace

from ltx_train.config.buckets import sample_bucket
from ltx_train.config.schema import Config
from ltx_train.contracts import ConfigError, ModalityName, Role
from ltx_train.diffusion.grid import PIXELS_PER_LATENT, Bucket


def first_stage(config: Config) -> Config:
    """The settings at half width and height; the same where the clip has one stage."""
    if config.sample.upsampler is None:
        return config
    bucket = sample_bucket(config)
    half = Bucket(bucket.width // 2, bucket.height // 2, bucket.frames)
    return replace(config, sample=replace(config.sample, bucket=str(half)))


def second_stage(config: Config) -> Config:
    """The settings with the distilled LoRA merged into the base."""
    s, merged = config.sample, config.sample.distilled_lora
    if merged is None:
        return config
    return replace(config, model=replace(config.model, merge=merged, merge_strength=s.distilled_strength))


def check(config: Config) -> None:
    """ConfigError for settings that two stages cannot be made of."""
    s = config.sample
    if s.upsampler is None:
        if s.distilled_lora is not None:
            raise ConfigError("sample.distilled_lora is used by the second of two stages: set sample.upsampler, too")
        return
    if config.mode.video is not Role.generate or s.video is not None:
        raise ConfigError("sample.upsampler: two stages are for a video that is generated whole: leave it out")
    bucket = sample_bucket(config)
    controlled = any(c.stream is ModalityName.video for c in config.mode.references)
    step = 2 * PIXELS_PER_LATENT * (config.data.reference_scale if controlled else 1)
    if bucket.width % step or bucket.height % step:
        raise ConfigError(
            f"sample.bucket={bucket}: width and height of two stages are multiples of {step}, because the first has "
            "half of them"
        )
    if s.distilled_lora is None and s.schedule != "distilled":
        raise ConfigError(
            "sample.upsampler: the second stage has noise levels of the distilled model: set sample.distilled_lora, or "
            "sample.schedule=distilled if model.path is distilled"
        )
    if s.distilled_lora is not None and config.model.merge is not None:
        raise ConfigError(
            "model.merge and sample.distilled_lora would both be merged: merge them into one file with `ltx-train lora`"
        )
