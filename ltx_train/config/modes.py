"""Validates modes: which conditions fit which roles and buckets, before any data is read.

Names and numbers only; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ltx_train.config.buckets import counted_fps, parse_bucket
from ltx_train.config.schema import Config
from ltx_train.contracts import SPEAKER, Condition, ConditionKind, ConfigError, ModalityName, Mode, Role
from ltx_train.diffusion.grid import PIXELS_PER_LATENT

_VIDEO_ONLY = (ConditionKind.first_frame, ConditionKind.spatial_crop)
_SPANS = (ConditionKind.prefix, ConditionKind.suffix)


@dataclass(frozen=True)
class Clip:
    """A bucket: latent steps by modality, and its size in pixels."""

    bucket: str
    steps: Mapping[ModalityName, int]
    width: int
    height: int


def training_modes(config: Config) -> list[tuple[float, Mode]]:
    """The modes of training with their weights: those of the mixture, or the single mode."""
    return [(w, config.modes[name]) for name, w in config.mixture.items() if w] or [(1.0, config.mode)]


def validate(config: Config) -> None:
    """Checks all modes. ConfigError names the mode, the condition and the fix."""
    if config.mixture and (min(config.mixture.values()) < 0 or sum(config.mixture.values()) == 0):
        raise ConfigError(f"mixture={dict(config.mixture)}: weights must be at least 0, and one of them is above 0")
    clips = list(_clips(config))
    for name, mode in {"mode": config.mode, **{f"modes.{k}": m for k, m in config.modes.items()}}.items():
        _validate_mode(name, mode, clips)
    weights = {ModalityName.video: config.loss.video_weight, ModalityName.audio: config.loss.audio_weight}
    for _, mode in training_modes(config):
        generated = [name for name in ModalityName if mode.role(name) is Role.generate]
        if all(weights[name] == 0 for name in generated):
            raise ConfigError(f"loss: the weight of every generated modality ({', '.join(generated)}) is 0")


def _clips(config: Config) -> Iterator[Clip]:
    for bucket in config.data.buckets:
        parsed = parse_bucket(bucket)
        steps = {ModalityName.video: parsed.latents[0], ModalityName.audio: parsed.audio_tokens(counted_fps(config))}
        yield Clip(bucket, steps, parsed.width, parsed.height)


def _validate_mode(name: str, mode: Mode, clips: list[Clip]) -> None:
    where = f"{name}.conditions"
    names = [condition.name for condition in mode.conditions]
    duplicates = [n for n in names if names.count(n) > 1]
    if duplicates:
        raise ConfigError(f"{where}: {duplicates[0]} stands twice; each kind may stand once per modality and source")
    if Role.generate not in (mode.video, mode.audio):
        raise ConfigError(f"{name}: nothing is generated; set {name}.video or {name}.audio to generate")
    for condition in mode.conditions:
        _validate_condition(f"{where}: {condition.kind.value}", condition, mode)
        for clip in clips:
            _validate_on_clip(f"{where}: {condition.kind.value}", condition, clip)
    for clip in clips:
        _validate_spans(where, mode, clip)


def _validate_condition(where: str, condition: Condition, mode: Mode) -> None:
    stream = condition.stream
    if condition.kind in _VIDEO_ONLY and stream is not ModalityName.video:
        raise ConfigError(f"{where} is about pictures: leave out modality: {stream.value}")
    if mode.role(stream) is not Role.generate:
        raise ConfigError(f"{where} needs mode.{stream.value}=generate")
    if not 0 <= condition.p <= 1 or not 0 <= condition.strength <= 1:
        raise ConfigError(f"{where}: p={condition.p} and strength={condition.strength} must lie in [0, 1]")
    gate = condition.sigmas
    if len(gate) != 2 or not 0 <= gate[0] < gate[1] <= 1:
        raise ConfigError(f"{where}: sigmas={list(gate)} must be [lowest, highest] within [0, 1]")
    scales = [s for s in (condition.temporal_scale, condition.spatial_scale) if s is not None]
    if condition.at_s is not None and (condition.kind is not ConditionKind.reference or condition.at_s < 0):
        raise ConfigError(f"{where}: at_s={condition.at_s:g} is the time of a reference, in seconds from 0 on")
    if condition.gap_s < 0 or any(scale < 1 for scale in scales):
        raise ConfigError(f"{where}: gap_s must be at least 0, spatial_scale and temporal_scale at least 1")
    spans = condition.latents
    if condition.kind in _SPANS and not (len(spans) in (1, 2) and 1 <= spans[0] <= spans[-1]):
        raise ConfigError(f"{where}: latents={list(spans)} must be [n] or [lowest, highest] latent steps, from 1 on")
    if condition.kind is ConditionKind.mask and condition.source == SPEAKER:
        raise ConfigError(f"{where}: name the tensor in the shards with source, as {stream.value}_mask")


def _validate_on_clip(where: str, condition: Condition, clip: Clip) -> None:
    if condition.kind is ConditionKind.first_frame and clip.steps[ModalityName.video] == 1:
        raise ConfigError(f"{where}: {clip.bucket} has one frame, nothing would be left to predict")
    if condition.kind is not ConditionKind.spatial_crop:
        return
    if clip.width <= PIXELS_PER_LATENT and clip.height <= PIXELS_PER_LATENT:
        raise ConfigError(f"{where}: {clip.bucket} is a single latent wide and high, nothing would be left to predict")
    if not condition.region:
        return
    region = list(condition.region)
    if len(region) != 4 or any(edge % PIXELS_PER_LATENT for edge in region):
        raise ConfigError(f"{where}: region={region} must be [top, left, bottom, right] in multiples of 32 pixels")
    top, left, bottom, right = region
    if not (0 <= top < bottom <= clip.height and 0 <= left < right <= clip.width):
        raise ConfigError(f"{where}: region={region} does not lie within {clip.bucket}")
    if (bottom - top, right - left) == (clip.height, clip.width):
        raise ConfigError(f"{where}: region={region} is all of {clip.bucket}, nothing would be left to predict")


def _validate_spans(where: str, mode: Mode, clip: Clip) -> None:
    """Refuses a prefix and suffix that can cover all latents of a clip together."""
    for stream in ModalityName:
        longest = {c.kind: c.latents[-1] for c in mode.conditions if c.kind in _SPANS and c.stream is stream}
        if longest and sum(longest.values()) >= clip.steps[stream]:
            raise ConfigError(
                f"{where}: {' and '.join(k.value for k in longest)} may give {sum(longest.values())} of the "
                f"{clip.steps[stream]} {stream.value} latents of {clip.bucket}: nothing would be left to predict; "
                "lower latents or take longer clips"
            )
