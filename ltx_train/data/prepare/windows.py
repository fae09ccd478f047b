"""Which part of each file becomes a sample: its first, its loudest, or one after the other.

Owns the choice of bucket, frame rate and start. It decodes sound alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.data.prepare import measure
from ltx_train.data.prepare.media import TOLERANCE_FRAMES, Facts, Part, choose_bucket, probe
from ltx_train.data.prepare.pictures import Crop, Framing
from ltx_train.data.prepare.sound import loudest, read_audio
from ltx_train.data.prepare.sources import Clip
from ltx_train.diffusion.grid import Bucket


class Windows(StrEnum):
    """first: the first frames. loudest: the part with most energy in its sound. all: as many as fit, end to end."""

    first = "first"
    loudest = "loudest"
    all = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How files become samples. fps: None keeps each file's own rate. sound_fps: the rate that gives sounds without
    pictures their length. trims: whether a pause before the first sound is left out."""

    buckets: tuple[Bucket, ...]
    fps: float | None
    windows: Windows
    crop: Crop
    sound_fps: float
    trims: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A sample to encode. given_s: seconds that its row gives, of which it is a part."""

    key: str
    clip: Clip
    part: Part
    facts: Facts
    given_s: float


def of_clip(clip: Clip, cutting: Cutting) -> list[Window]:
    """The windows of a clip, at least one. DataError when it is too short or cannot be read."""
    facts = probe(clip.medium)
    if clip.video is not None and not facts.fps:
        raise DataError(f"{clip.video} has no video stream: name it in the column audio")
    span = _span(clip, facts)
    if cutting.trims:
        span = _trimmed(clip, facts, span)
    bucket, fps = _bucket(clip, facts, span[1] - span[0], cutting)
    framing = Framing(crop=cutting.crop, face=clip.face)
    length = bucket.frames / fps
    starts = list(_starts(clip, facts, span, length, fps=fps, windows=cutting.windows))
    return [
        Window(
            key=clip.key if len(starts) == 1 else f"{clip.key}_{number:03d}", clip=clip, facts=facts,
            part=Part(bucket=bucket, fps=fps, start=start, framing=framing, audio=clip.files.get("audio")),
            given_s=span[1] - span[0],
        )
        for number, start in enumerate(starts)
    ]  # fmt: skip


def _span(clip: Clip, facts: Facts) -> tuple[float, float]:
    """Seconds of the file that the row gives."""
    end = facts.seconds if clip.end is None else min(clip.end, facts.seconds)
    if clip.start >= end:
        raise DataError(f"{clip.medium} lasts {facts.seconds:.2f} s, and its row starts at {clip.start:g} s")
    return clip.start, end


def _trimmed(clip: Clip, facts: Facts, span: tuple[float, float]) -> tuple[float, float]:
    """The span from its first sound on."""
    waveform, rate = _sound(clip, facts, span)
    pause = 0.0 if waveform is None else measure.leading_pause(waveform, rate)
    return (span[0] + pause, span[1]) if pause < span[1] - span[0] else span


def _bucket(clip: Clip, facts: Facts, seconds: float, cutting: Cutting) -> tuple[Bucket, float]:
    """The bucket and the frame rate of a clip's samples."""
    if clip.video is None:
        return _of_sound(clip.medium, cutting.buckets, seconds, cutting.sound_fps), cutting.sound_fps
    fps = facts.fps if facts.still or cutting.fps is None else cutting.fps
    size = {"width": facts.width, "height": facts.height}
    return choose_bucket(clip.video, cutting.buckets, seconds, fps=fps, **size), fps


def _of_sound(path: Path, buckets: Sequence[Bucket], seconds: float, fps: float) -> Bucket:
    """The longest bucket that a sound fills."""
    fitting = [bucket for bucket in buckets if bucket.frames <= seconds * fps + TOLERANCE_FRAMES]
    if not fitting:
        shortest = min(bucket.frames for bucket in buckets) / fps
        raise DataError(f"{path} lasts {seconds:.2f} s, but the shortest bucket takes {shortest:.2f} s")
    return max(fitting, key=lambda bucket: bucket.frames)


def _sound(clip: Clip, facts: Facts, span: tuple[float, float]) -> tuple[Tensor | None, int]:
    """The sound of a span. A clip's own counts from the file's first frame on."""
    path, origin = (clip.files["audio"], 0.0) if "audio" in clip.files else (clip.medium, facts.start)
    return read_audio(path, origin + span[0], span[1] - span[0])


def _starts(
    clip: Clip, facts: Facts, span: tuple[float, float], length: float, *, fps: float, windows: Windows
) -> Iterator[float]:
    """Seconds at which the parts of a clip start."""
    if windows is Windows.all:
        count = max(1, int((span[1] - span[0] + TOLERANCE_FRAMES / fps) / length))
        yield from (span[0] + number * length for number in range(count))
    elif windows is Windows.loudest and span[1] - span[0] > length:
        yield span[0] + _loudest_start(clip, facts, span, length)
    else:
        yield span[0]


def _loudest_start(clip: Clip, facts: Facts, span: tuple[float, float], length: float) -> float:
    waveform, rate = _sound(clip, facts, span)
    start = None if waveform is None else loudest(waveform, rate, length)
    return 0.0 if start is None else start / rate
