"""Decodes the sound of media files with PyAV into waveforms, aligned by their timestamps.

It knows no pictures and no models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ltx_train.contracts import DataError

# ffmpeg's names of the layouts whose channels have weights; of a file that names none they are known by their number.
_MIXED = ("mono", "stereo", "5.1", "5.1(side)", "7.1", "1 channels", "2 channels", "6 channels", "8 channels")
# A decoder that starts inside a file needs some packets before its samples are those of a whole decode.
_LEAD_S = 1.0
_WINDOW_STEP_S = 0.1


def read_audio(path: Path, start: float = 0.0, seconds: float | None = None) -> tuple[Tensor | None, int]:
    """Returns the waveform (channels, samples) float32 from `start` on, and its rate in Hz; (None, 0) without sound.

    The rate is the file's own. With `seconds`, the waveform is cut or padded with silence to exactly that length.
    The timestamps of the frames account for a decoder's delay. DataError when the file cannot be decoded.
    """
    try:
        return _decoded(path, start, seconds)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: its sound cannot be decoded ({error})") from error


def loudest(waveform: Tensor, rate: int, seconds: float) -> int | None:
    """The first sample of the `seconds` with most energy of a waveform (channels, samples), None if it is shorter."""
    length, step = round(seconds * rate), max(1, round(_WINDOW_STEP_S * rate))
    if waveform.shape[1] < length:
        return None
    energy = waveform.double().square().mean(0).cumsum(0)
    starts = range(0, waveform.shape[1] - length + 1, step)
    return max(starts, key=lambda s: float(energy[s + length - 1] - (energy[s - 1] if s else 0)))


def averaged(container: Any) -> str:
    """The layout of a sound whose channels are averaged, empty for one that is mixed down by weights (`model.mel`)."""
    layouts = [stream.layout.name for stream in container.streams.audio[:1]]
    return "" if not layouts or layouts[0] in _MIXED else layouts[0]


def _decoded(path: Path, start: float, seconds: float | None) -> tuple[Tensor | None, int]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None, 0
        stream = container.streams.audio[0]
        # Not behind the container's end: PyAV's streams point into it.
        rate, averages = stream.rate, bool(averaged(container))
        chunks, first = _chunks(container, stream, start, seconds)
    if not chunks or first is None:
        return None, 0
    waveform = torch.from_numpy(np.concatenate(chunks, axis=1))
    if averages:
        waveform = waveform.mean(dim=0, keepdim=True)
    return _aligned(waveform, rate, first - start, seconds), rate


def _chunks(
    container: Any, stream: Any, start: float, seconds: float | None
) -> tuple[list[NDArray[np.float32]], float | None]:
    """The decoded samples that cover the window, and the time of the first."""
    if start > 2 * _LEAD_S:
        container.seek(int((start - _LEAD_S) / stream.time_base), stream=stream)
    # Packed: PyAV's planar frames end at seven channels.
    resampler = av.AudioResampler(format="flt")
    chunks: list[NDArray[np.float32]] = []
    first: float | None = None
    for frame in container.decode(stream):
        if first is None:
            first = float(frame.time or 0.0)
        chunks += [_channels(out) for out in resampler.resample(frame)]
        if seconds is not None and sum(c.shape[1] for c in chunks) / stream.rate > start + seconds - first + 1:
            break
    return chunks, first


def _channels(frame: Any) -> NDArray[np.float32]:
    """(channels, samples) of a packed frame."""
    return np.asarray(frame.to_ndarray(), np.float32).reshape(-1, frame.layout.nb_channels).T


def _aligned(waveform: Tensor, rate: int, offset: float, seconds: float | None) -> Tensor:
    shift = round(offset * rate)
    waveform = F.pad(waveform, (shift, 0)) if shift > 0 else waveform[:, -shift:]
    if seconds is None:
        return waveform
    length = round(seconds * rate)
    return F.pad(waveform[:, :length], (0, max(0, length - waveform.shape[1])))
