"""Measures what a clip sounds and looks like as it is trained.

Owns the definitions of the numbers; what of them is worth a word is decided in `findings`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyloudnorm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import signal
from torch import Tensor

Samples = NDArray[np.float64]

_FRAME_S = 0.04
# dB below the clip's loud parts that count as a pause, and the level that always does.
_PAUSE_DB, _SILENT_DB = 40.0, -70.0
_FULL_SCALE = 0.99
# Samples in a row at full scale that no undistorted recording has.
_CLIPPED_RUN = 3
# Pitch of voices in Hz, and the periodicity of a voiced frame.
_PITCH_HZ, _PERIODIC = (60.0, 400.0), 0.5
# dB below the strongest frequency where a sound's band ends.
_BAND_DB = 60.0
_DARK, _STILL = 8.0, 0.25
# Pixels a side that cuts and motion are looked for on.
_SEEN = 128


def sound(waveform: Tensor, rate: int) -> dict[str, float]:
    """Of a waveform (channels, samples). Levels in dB of full scale, lengths in seconds.

    lufs: integrated loudness (ITU-R BS.1770); absent below 0.4 s. peak_db: true peak, four times oversampled. clipped:
    share of samples in runs at full scale. leading_s: pause before the first sound. pauses: share of the rest that is
    pause. snr_db: loud parts over the quietest tenth of what is no pause. voiced: share of what is no pause that has a
    pitch. band_hz: highest frequency within 60 dB of the strongest.
    """
    mono: Samples = waveform.double().mean(0).numpy()
    levels = _levels(mono, rate)
    active = _active(levels)
    first = _first(active)
    measured = {
        "peak_db": _true_peak(waveform), "clipped": _clipped(waveform), "leading_s": first * _FRAME_S,
        "pauses": float(1 - active[first:].mean()) if first < len(levels) else 1.0,
    }  # fmt: skip
    if active.any():
        measured |= {
            "snr_db": _loud(levels) - float(np.percentile(levels[active], 10)), "voiced": _voiced(mono, rate, active),
            "band_hz": _band(mono, rate),
        }  # fmt: skip
    loudness = _loudness(waveform, rate)
    return {name: round(value, 3) for name, value in ({"lufs": loudness} | measured).items() if math.isfinite(value)}


def leading_pause(waveform: Tensor, rate: int) -> float:
    """Seconds before the first sound of a waveform (channels, samples); its length when there is none."""
    levels = _levels(waveform.double().mean(0).numpy(), rate)
    return _first(_active(levels)) * _FRAME_S


def pictures(pixels: Tensor) -> dict[str, float]:
    """Of pictures (F, H, W, 3) uint8.

    cut_frame: the first frame behind a cut, absent without one. dark: share of black frames. still: share of frames
    equal to the one before. detail_db: PSNR of the pictures against themselves at half the size and back, high when
    they were enlarged or are blurred.
    """
    thinned = pixels[:, :: max(1, pixels.shape[1] // _SEEN), :: max(1, pixels.shape[2] // _SEEN)]
    grey = thinned.float().mean(dim=-1)
    changes = (grey[1:] - grey[:-1]).abs().mean(dim=(1, 2))
    some = pixels[:: max(1, len(pixels) // 8)].float().mean(dim=-1)
    measured = {"dark": float((grey.mean(dim=(1, 2)) < _DARK).float().mean()), "detail_db": _detail(some)}
    if len(changes):
        measured["still"] = float((changes < _STILL).float().mean())
        cut = _cut(thinned, changes)
        measured |= {} if cut is None else {"cut_frame": float(cut)}
    return {name: round(min(value, 99.0), 3) for name, value in measured.items()}


def _loud(levels: Samples) -> float:
    return float(np.percentile(levels, 95))


def _active(levels: Samples) -> NDArray[np.bool_]:
    """The frames that are no pause."""
    return levels > max(_loud(levels) - _PAUSE_DB, _SILENT_DB)


def _first(active: NDArray[np.bool_]) -> int:
    return int(np.argmax(active)) if active.any() else len(active)


def _levels(mono: Samples, rate: int) -> Samples:
    """dB of frames of 40 ms."""
    size = max(1, round(_FRAME_S * rate))
    frames = mono[: len(mono) // size * size].reshape(-1, size) if len(mono) >= size else mono[None]
    return 10 * np.log10(np.maximum((frames**2).mean(axis=1), 1e-12))


def _loudness(waveform: Tensor, rate: int) -> float:
    channels = waveform.double().T.numpy()
    channels = channels if channels.shape[1] <= 2 else channels.mean(axis=1, keepdims=True)
    if len(channels) < 0.4 * rate:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the logarithm of silence
        return float(pyloudnorm.Meter(rate).integrated_loudness(channels))


def _true_peak(waveform: Tensor) -> float:
    peak = float(np.abs(signal.resample_poly(waveform.double().numpy(), 4, 1, axis=1)).max(initial=0.0))
    return 20 * math.log10(max(peak, 1e-6))


def _clipped(waveform: Tensor) -> float:
    """Share of samples in runs at full scale. A decoder of compressed sound overshoots it."""
    full = waveform.abs() >= _FULL_SCALE
    flat = F.max_pool1d(1 - full.float()[None], _CLIPPED_RUN, 1) == 0
    return float(flat.float().mean()) if flat.numel() else 0.0


def _voiced(mono: Samples, rate: int, active: NDArray[np.bool_]) -> float:
    """Share of the active frames whose autocorrelation has a peak at the period of a voice."""
    size = max(1, round(_FRAME_S * rate))
    shortest, longest = int(rate / _PITCH_HZ[1]), int(rate / _PITCH_HZ[0])
    periodic = [
        _periodicity(mono[start : start + size + longest], size, shortest, longest) > _PERIODIC
        for start in (np.flatnonzero(active) * size).tolist()
        if start + size + longest <= len(mono)
    ]
    return float(np.mean(periodic)) if periodic else 0.0


def _periodicity(frame: Samples, size: int, shortest: int, longest: int) -> float:
    """Largest normalized correlation of a frame with itself, shifted by a period of a voice."""
    head, energy = frame[:size], np.concatenate([[0.0], np.cumsum(frame**2)])
    products = signal.correlate(frame, head, mode="valid", method="fft")[shortest : longest + 1]
    lags = np.arange(shortest, shortest + len(products))
    norms = np.sqrt(np.maximum((energy[lags + size] - energy[lags]) * (head**2).sum(), 1e-12))
    return float((products / norms).max(initial=0.0))


def _band(mono: Samples, rate: int) -> float:
    frequencies, power = signal.welch(mono, rate, nperseg=min(len(mono), 2048))
    strong: Any = frequencies[power >= power.max() * 10 ** (-_BAND_DB / 10)]
    return float(strong.max(initial=0.0))


def _detail(grey: Tensor) -> float:
    frames = grey[:, None]
    size = frames.shape[-2:]
    half = F.interpolate(frames, (max(1, size[0] // 2), max(1, size[1] // 2)), mode="bicubic", antialias=True)
    error = float((F.interpolate(half, size, mode="bicubic") - frames).square().mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


def _cut(pixels: Tensor, changes: Tensor) -> int | None:
    """The first frame of another scene: a change of its colours that stands out from the motion around it."""
    histograms = torch.stack([_histogram(frame) for frame in pixels])
    jumps = (histograms[1:] - histograms[:-1]).abs().sum(dim=1) / 2
    worst = int(jumps.argmax())
    others = torch.cat([changes[:worst], changes[worst + 1 :]])
    usual = float(others.median()) if len(others) else 0.0
    stands_out = float(jumps[worst]) > 0.35 and float(changes[worst]) > max(10.0, 5 * usual)
    return worst + 1 if stands_out else None


def _histogram(frame: Tensor) -> Tensor:
    """Shares of 4 x 4 x 4 colours."""
    bins = (frame.long() // 64).reshape(-1, 3)
    counts = torch.bincount(bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2], minlength=64)
    return counts.float() / len(bins)
