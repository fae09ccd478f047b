"""Writes a piece of a recording as a clip of its own, with the recording's frames and their times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.data.footage.pieces import Span
from ltx_train.data.prepare import sound
from ltx_train.data.prepare.media import Facts, probe
from ltx_train.model import mel

# Nearly lossless: clips are encoded once more before they are trained.
_QUALITY = {"crf": "10", "preset": "veryfast"}
_SOUND_BITS = 320_000


def write(source: Path, piece: Span, target: Path) -> None:
    """H.264 and AAC, atomically. Frames keep their size, their rate and their distances. DataError when either file
    cannot be used."""
    facts = probe(source)
    waveform, rate = sound.read_audio(source, facts.start + piece.start, piece.seconds)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        with av.open(str(source)) as given, av.open(str(temporary), "w", format="mp4") as made:
            # Both streams before the first packet: the header is written with it.
            pictures = _picture_stream(made, given.streams.video[0], facts)
            voice = None if waveform is None else _sound_stream(made, rate)
            for frame in _frames(given, piece, facts.start):
                made.mux(pictures.encode(frame))
            made.mux(pictures.encode())
            if voice is not None and waveform is not None:
                made.mux([*voice.encode(_sound_frame(waveform, rate)), *voice.encode()])
        os.replace(temporary, target)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{target} could not be made of {source} ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _frames(container: Any, piece: Span, origin: float) -> Iterator[Any]:
    """The pictures of a piece, upright, with times from its start on. origin: the time of the file's first picture."""
    stream = container.streams.video[0]
    container.seek(round((origin + piece.start) / stream.time_base), stream=stream)
    half = 0.5 / float(stream.average_rate)  # cuts fall on frames: rounded times must not lose one
    base: int | None = None
    for frame in container.decode(stream):
        time = float(frame.time) - origin
        if time >= piece.end - half:
            return
        if time >= piece.start - half:
            base = frame.pts if base is None else base
            upright = _upright(frame)
            upright.pts, upright.time_base, upright.pict_type = frame.pts - base, stream.time_base, 0
            yield upright


def _upright(frame: Any) -> Any:
    """The frame without its recorder's rotation: the clip has no mark of it."""
    turn = round(getattr(frame, "rotation", 0) / 90) % 4
    if not turn:
        return frame
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turn)), "rgb24")


def _picture_stream(container: Any, given: Any, facts: Facts) -> Any:
    stream = container.add_stream("libx264", rate=given.average_rate, options=_QUALITY)
    # Even sides, which yuv420p needs.
    stream.width, stream.height = facts.width // 2 * 2, facts.height // 2 * 2
    stream.pix_fmt, stream.codec_context.time_base, stream.time_base = "yuv420p", given.time_base, given.time_base
    return stream


def _sound_stream(container: Any, rate: int) -> Any:
    stream = container.add_stream("aac", rate=rate, layout="stereo")
    stream.bit_rate = _SOUND_BITS
    return stream


def _sound_frame(waveform: Tensor, rate: int) -> Any:
    samples = np.ascontiguousarray(mel.to_stereo(waveform).numpy())
    frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame
