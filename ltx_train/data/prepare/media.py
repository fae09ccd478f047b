"""Decodes clips with PyAV into frames at a rate and a waveform aligned with them.

Owns timing. Frames are picked by their timestamps, so files with variable frame rates or odd start
times decode correctly. It knows buckets, not models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.stream import Disposition
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.data.prepare import sound
from ltx_train.data.prepare.pictures import Framing, Picture, picture_to_bucket
from ltx_train.data.prepare.tables import STILLS
from ltx_train.diffusion.grid import Bucket

# Frames that a declared duration may lack.
TOLERANCE_FRAMES = 1.5
# Still pictures count as clips of one frame a second, as in the reference implementation.
STILL_FPS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a file declares. start: time of its first frame; seconds: length from there on; fps: frames a second on
    average; sound_late: seconds from the first frame to the first sound, 0 without sound; still: a single picture. Of a
    file without pictures width, height and fps are 0."""

    seconds: float
    fps: float
    width: int
    height: int
    start: float
    has_sound: bool
    averaged: str
    sound_late: float
    still: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is read of a clip: from `start` seconds behind the file's first frame on, framed, at `fps` frames a second.

    audio: the file that holds the sound; None: the clip's own.
    """

    bucket: Bucket
    fps: float
    start: float = 0.0
    framing: Framing = field(default_factory=Framing)
    audio: Path | None = None

    @property
    def seconds(self) -> float:
        return self.bucket.frames / self.fps


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """A decoded part. pixels: (F, H, W, 3) uint8, None of a sound alone. waveform: (channels, samples) float32 of the
    same duration exactly, or None without sound. rate: samples per second of the waveform."""

    pixels: Tensor | None
    waveform: Tensor | None
    rate: int


def probe(path: Path) -> Facts:
    """What the file declares. DataError when it is no medium or declares no length."""
    try:
        with av.open(str(path)) as container:
            return _facts(container, path)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be decoded ({error})") from error


def _facts(container: Any, path: Path) -> Facts:
    # A cover inside a sound file is no video.
    films = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
    pictures = next(films, None)
    voice = next(iter(container.streams.audio), None)
    if pictures is None and voice is None:
        raise DataError(f"{path} has neither pictures nor sound")
    stream = pictures or voice
    still = path.suffix.lower() in STILLS
    fps = float(pictures.average_rate or pictures.guessed_rate or 0) if pictures else 0.0
    turned = round(_rotation(container, pictures) / 90) % 2 if pictures else 0
    size = (pictures.width, pictures.height) if pictures else (0, 0)
    return Facts(
        seconds=1 / STILL_FPS if still else _seconds(container, stream, path), fps=STILL_FPS if still else fps,
        width=size[turned], height=size[1 - turned], start=_start(stream), has_sound=voice is not None,
        averaged=sound.averaged(container), still=still,
        sound_late=_start(voice) - _start(stream) if pictures and voice else 0.0,
    )  # fmt: skip


def _start(stream: Any) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))


def _rotation(container: Any, stream: Any) -> float:
    """Degrees by which players turn the pictures: only decoded frames tell it."""
    frame = next(container.decode(stream), None)
    container.seek(0)
    return float(getattr(frame, "rotation", 0) or 0)


def read_clip(path: Path, part: Part) -> Media:
    """Decodes a part of a clip at its bucket's size, with the sound. DataError names the fault of a file."""
    pixels, start = _pixels(path, part)
    waveform, rate = sound.read_audio(part.audio or path, part.start if part.audio else start, part.seconds)
    return Media(pixels=pixels, waveform=waveform, rate=rate)


def read_pixels(path: Path, part: Part) -> Tensor:
    """The pictures alone: (F, H, W, 3) uint8."""
    return _pixels(path, part)[0]


def _pixels(path: Path, part: Part) -> tuple[Tensor, float]:
    """The pictures, and the time of the first in the file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video stream")
            return _frames(container, container.streams.video[0], part, path)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be decoded ({error})") from error


def read_sound(path: Path, part: Part) -> Media:
    """A part of a file's sound, without pictures."""
    waveform, rate = sound.read_audio(path, part.start, part.seconds)
    if waveform is None:
        raise DataError(f"{path} has no sound")
    return Media(pixels=None, waveform=waveform, rate=rate)


def choose_bucket(
    path: Path, buckets: Sequence[Bucket], seconds: float, *, fps: float, width: int, height: int
) -> Bucket:
    """Returns the best of the buckets for which the clip is long enough; DataError when there is none.

    The best bucket has the nearest aspect ratio, then the most frames, then the most pixels.
    """
    available = seconds * fps + TOLERANCE_FRAMES
    fitting = [b for b in buckets if b.frames <= available]
    if not fitting:
        shortest = min(b.frames for b in buckets)
        raise DataError(f"{path} lasts {seconds:.2f} s, but the shortest bucket needs {shortest} frames at {fps:g} fps")
    ratio = math.log(width / height)
    return min(
        fitting, key=lambda b: (round(abs(math.log(b.width / b.height) - ratio), 6), -b.frames, -b.width * b.height)
    )


def _frames(container: Any, stream: Any, part: Part, path: Path) -> tuple[Tensor, float]:
    """Returns the frame shown at start + i / fps for every output frame i, and the time of the first in the file."""
    width, height, count = part.bucket.width, part.bucket.height, part.bucket.frames
    stream.thread_type = "AUTO"
    pictures: list[Picture] = []
    origin: float | None = None
    shown: Any = None
    used: Picture | None = None  # the shown frame at the bucket's size, once it was needed
    for time, frame in _timed(container, stream, part.start):
        if origin is None:
            origin = (time if part.start == 0 else _start(stream)) + part.start
        # Half an output frame of slack makes equal rates map one to one despite rounded timestamps.
        while shown is not None and len(pictures) < count and (len(pictures) + 0.5) / part.fps < time - origin:
            used = picture_to_bucket(shown, width, height, part.framing) if used is None else used
            pictures.append(used)
        if len(pictures) == count:
            break
        shown, used = frame, None
    if shown is None or origin is None:
        raise DataError(f"{path} holds no decodable frame")
    missing = count - len(pictures)
    if missing > TOLERANCE_FRAMES + 1:
        raise DataError(f"{path} ends {missing} frames before its declared length: re-encode or cut it")
    if missing:
        pictures += [picture_to_bucket(shown, width, height, part.framing) if used is None else used] * missing
    return torch.from_numpy(np.stack(pictures)), origin


def _timed(container: Any, stream: Any, start: float) -> Iterator[tuple[float, Any]]:
    """Frames with their times, from the last key frame before `start` on."""
    if start > 0:
        container.seek(int((_start(stream) + start) / stream.time_base), stream=stream)
    for index, frame in enumerate(container.decode(stream)):
        yield float(frame.time) if frame.time is not None else index / float(stream.average_rate), frame


def _seconds(container: Any, stream: Any, path: Path) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    raise DataError(f"{path} declares no duration: remux it (ffmpeg -i in -c copy out.mp4)")
