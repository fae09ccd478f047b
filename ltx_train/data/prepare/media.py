"""Decodes media files with PyAV into frames at a fixed rate and a waveform aligned with them.

Owns timing. Frames are picked by their timestamps, so files with variable frame rates or odd start
times decode correctly. It knows buckets, not models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.diffusion.grid import Bucket

Picture = NDArray[np.uint8]
_TOLERANCE_FRAMES = 1.5
# ffmpeg's names of the layouts whose channels have weights; of a file that names none they are known by their number.
_MIXED = ("mono", "stereo", "5.1", "5.1(side)", "7.1", "1 channels", "2 channels", "6 channels", "8 channels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """A decoded clip.

    pixels: (F, H, W, 3) uint8. waveform: (channels, samples) float32 of exactly the same duration, or None without
    sound. rate: samples per second of the waveform. source_fps: frames per second of the file, on average.
    averaged: the layout of a sound that nobody has weights for, so that its channels were averaged; else empty.
    """

    pixels: Tensor
    waveform: Tensor | None
    rate: int
    bucket: Bucket
    source_fps: float
    averaged: str


def read_clip(path: Path, buckets: list[Bucket], fps: float) -> Media:
    """Decodes the first frames of a clip at its bucket's size, with the sound. DataError names the fault of a file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video stream")
            stream = container.streams.video[0]
            seconds = _seconds(container, stream, path)
            bucket = choose_bucket(path, buckets, seconds, fps=fps, width=stream.width, height=stream.height)
            pixels, start = _frames(container, stream, bucket, fps, path)
            source_fps = float(stream.average_rate or stream.guessed_rate or 0)
            averaged = next((_averaged(stream) for stream in container.streams.audio), "")
        waveform, rate = read_audio(path, start, bucket.frames / fps)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be decoded ({error})") from error
    return Media(pixels=pixels, waveform=waveform, rate=rate, bucket=bucket, source_fps=source_fps, averaged=averaged)


def read_audio(path: Path, start: float = 0.0, seconds: float | None = None) -> tuple[Tensor | None, int]:
    """Returns the waveform (channels, samples) float32 from `start` on, and its rate in Hz; (None, 0) without sound.

    The rate is the file's own. With `seconds`, the waveform is cut or padded with silence to exactly that length.
    The timestamps of the frames account for a decoder's delay. DataError when the file cannot be decoded.
    """
    try:
        return _decoded_audio(path, start, seconds)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: its sound cannot be decoded ({error})") from error


def _decoded_audio(path: Path, start: float, seconds: float | None) -> tuple[Tensor | None, int]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None, 0
        stream = container.streams.audio[0]
        # Packed: PyAV's planar frames end at seven channels.
        resampler = av.AudioResampler(format="flt")
        chunks: list[NDArray[np.float32]] = []
        first: float | None = None
        # Not behind the container's end: PyAV's streams point into it.
        rate, averaged = stream.rate, bool(_averaged(stream))
        for frame in container.decode(stream):
            if first is None:
                first = float(frame.time or 0.0)
            chunks += [_channels(out) for out in resampler.resample(frame)]
            if seconds is not None and sum(c.shape[1] for c in chunks) / rate > start + seconds - first + 1:
                break
    if not chunks or first is None:
        return None, 0
    waveform = torch.from_numpy(np.concatenate(chunks, axis=1))
    if averaged:
        waveform = waveform.mean(dim=0, keepdim=True)
    return _aligned(waveform, rate, first - start, seconds), rate


def _channels(frame: Any) -> NDArray[np.float32]:
    """(channels, samples) of a packed frame."""
    return np.asarray(frame.to_ndarray(), np.float32).reshape(-1, frame.layout.nb_channels).T


def _averaged(stream: Any) -> str:
    """The layout of a stream whose channels are averaged, empty for one that is mixed down by weights (`model.mel`)."""
    return "" if stream.layout.name in _MIXED else stream.layout.name


def choose_bucket(
    path: Path, buckets: list[Bucket], seconds: float, *, fps: float, width: int, height: int
) -> Bucket:  # fmt: skip
    """Returns the best of the buckets for which the clip is long enough; DataError when there is none.

    The best bucket has the nearest aspect ratio, then the most frames, then the most pixels.
    """
    available = seconds * fps + _TOLERANCE_FRAMES
    fitting = [b for b in buckets if b.frames <= available]
    if not fitting:
        shortest = min(b.frames for b in buckets)
        raise DataError(f"{path} lasts {seconds:.2f} s, but the shortest bucket needs {shortest} frames at {fps:g} fps")
    ratio = math.log(width / height)
    return min(
        fitting, key=lambda b: (round(abs(math.log(b.width / b.height) - ratio), 6), -b.frames, -b.width * b.height)
    )


def picture_to_bucket(frame: Any, width: int, height: int) -> Picture:
    """Resizes a frame to cover the bucket and crops the centre. Undoes the recorder's rotation.

    As the reference implementation does it: decoded to rgb24 at its own size, then resized (bicubic, antialiased).
    swscale does both in one call, but truncates: grey 128 became 126.
    """
    turn = round(getattr(frame, "rotation", 0) / 90) % 4
    target = (height, width) if turn % 2 else (width, height)
    scale = max(target[0] / frame.width, target[1] / frame.height)
    size = (max(target[0], round(frame.width * scale)), max(target[1], round(frame.height * scale)))
    scaled = _resized(frame.to_ndarray(format="rgb24"), *size)
    left, top = (size[0] - target[0]) // 2, (size[1] - target[1]) // 2
    return np.ascontiguousarray(np.rot90(scaled[top : top + target[1], left : left + target[0]], turn))


def _resized(picture: Picture, width: int, height: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    # Channels last: torch has a kernel for bytes in that order.
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _frames(container: Any, stream: Any, bucket: Bucket, fps: float, path: Path) -> tuple[Tensor, float]:
    """Returns the frame shown at i / fps for every output frame i, and the time of the file's first frame."""
    width, height, count = bucket.width, bucket.height, bucket.frames
    stream.thread_type = "AUTO"
    pictures: list[Picture] = []
    start: float | None = None
    shown: Picture | None = None
    for time, frame in _timed(container, stream):
        start = time if start is None else start
        # Half an output frame of slack makes equal rates map one to one despite rounded timestamps.
        while shown is not None and len(pictures) < count and len(pictures) / fps + 0.5 / fps < time - start:
            pictures.append(shown)
        if len(pictures) == count:
            break
        shown = picture_to_bucket(frame, width, height)
    if shown is None or start is None:
        raise DataError(f"{path} holds no decodable frame")
    missing = count - len(pictures)
    if missing > _TOLERANCE_FRAMES + 1:
        raise DataError(f"{path} ends {missing} frames before its declared length: re-encode or cut it")
    pictures += [shown] * missing
    return torch.from_numpy(np.stack(pictures)), start


def _timed(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    for index, frame in enumerate(container.decode(stream)):
        yield float(frame.time) if frame.time is not None else index / float(stream.average_rate), frame


def _seconds(container: Any, stream: Any, path: Path) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    raise DataError(f"{path} declares no duration: remux it (ffmpeg -i in -c copy out.mp4)")


def _aligned(waveform: Tensor, rate: int, offset: float, seconds: float | None) -> Tensor:
    shift = round(offset * rate)
    waveform = F.pad(waveform, (shift, 0)) if shift > 0 else waveform[:, -shift:]
    if seconds is None:
        return waveform
    length = round(seconds * rate)
    return F.pad(waveform[:, :length], (0, max(0, length - waveform.shape[1])))
