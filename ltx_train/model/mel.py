"""Converts waveforms to the log-mel spectrograms that the audio VAE expects; plain torch, float32.

Owns resampling, channel layout and the mel filters. All constants are the reference's: 16 kHz,
window 1024, hop 160, 64 Slaney mels up to 8 kHz, natural logarithm clamped at 1e-5.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16000
WINDOW, HOP, MEL_BINS, MAX_HZ = 1024, 160, 64, 8000.0
_LOG_FLOOR = 1e-5
_SINC_ZEROS, _ROLLOFF = 6, 0.99


# Surround in ffmpeg's order of channels, by their number: weights of front left, front right, centre, low frequencies,
# back left, back right, side left, side right in the left channel. The right one mirrors them. The numbers are those of
# the reference implementation, divided by their sum; low frequencies are left out.
_SIDE = 0.707
_SURROUND = {
    6: (1.0, 0.0, _SIDE, 0.0, _SIDE, 0.0),
    8: (1.0, 0.0, _SIDE, 0.0, _SIDE, 0.0, _SIDE, 0.0),
}
_MIRRORED = (1, 0, 2, 3, 5, 4, 7, 6)


def to_stereo(waveform: Tensor) -> Tensor:
    """(..., channels, samples) -> (..., 2, samples): mono is duplicated, 5.1 and 7.1 are mixed down by weights.

    Any other number of channels is averaged.
    """
    channels = waveform.shape[-2]
    if channels == 2:
        return waveform
    if channels == 1:
        return waveform.expand(*waveform.shape[:-2], 2, waveform.shape[-1])
    if channels not in _SURROUND:
        return to_stereo(waveform.mean(dim=-2, keepdim=True))
    left = _SURROUND[channels]
    right = [left[place] for place in _MIRRORED[:channels]]
    return torch.tensor([left, right]).to(waveform) / sum(left) @ waveform


def resample(waveform: Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Band-limited resampling of (..., samples) by a Hann-windowed sinc (6 zero crossings, rolloff 0.99).

    Returns (..., ceil(samples * new_rate / rate)).
    """
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    if old == new:
        return waveform
    kernel, width = _sinc_kernel(old, new)
    flat = waveform.reshape(-1, 1, waveform.shape[-1])
    out = F.conv1d(F.pad(flat, (width, width + old)), kernel.to(waveform), stride=old)
    length = math.ceil(new * waveform.shape[-1] / old)
    return out.transpose(1, 2).reshape(*waveform.shape[:-1], -1)[..., :length]


def log_mel(waveform: Tensor) -> Tensor:
    """(B, 2, samples) at 16 kHz -> (B, 2, 1 + samples // 160, 64).

    Inputs of up to half a window are padded with silence, because reflection padding needs a longer input.
    """
    short = WINDOW // 2 + 1 - waveform.shape[-1]
    waveform = F.pad(waveform.float(), (0, max(0, short)))
    window = torch.hann_window(WINDOW, periodic=True, device=waveform.device)
    spectrum = torch.stft(
        waveform.flatten(0, 1), WINDOW, HOP, window=window, center=True, pad_mode="reflect", return_complex=True
    ).abs()
    mel = filters().to(waveform.device) @ spectrum
    return mel.clamp_min(_LOG_FLOOR).log().transpose(1, 2).unflatten(0, waveform.shape[:2])


@lru_cache(maxsize=8)
def _sinc_kernel(old: int, new: int) -> tuple[Tensor, int]:
    """Resampling kernels (new, 1, taps) for the rates old -> new, one per output phase, and the padding."""
    cutoff = min(old, new) * _ROLLOFF
    width = math.ceil(_SINC_ZEROS * old / cutoff)
    taps = torch.arange(-width, width + old, dtype=torch.float64)[None, None] / old
    phase = torch.arange(0, -new, -1, dtype=torch.float64)[:, None, None] / new
    time = ((phase + taps) * cutoff).clamp(-_SINC_ZEROS, _SINC_ZEROS)
    window = torch.cos(time * math.pi / _SINC_ZEROS / 2).square()
    return (torch.sinc(time) * window * cutoff / old).float(), width


@lru_cache(maxsize=4)
def filters(window: int = WINDOW) -> Tensor:
    """(64, window / 2 + 1) triangular filters on the Slaney scale, each of unit area."""
    top = _hz_to_mel(MAX_HZ)
    edges = torch.tensor([_mel_to_hz(top * i / (MEL_BINS + 1)) for i in range(MEL_BINS + 2)])
    bins = torch.linspace(0, SAMPLE_RATE // 2, window // 2 + 1)
    slopes = edges[:, None] - bins[None]
    widths = edges.diff()[:, None]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp_min(0)
    return triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]


# The Slaney scale: linear below 1 kHz (200/3 Hz per mel), logarithmic above (27 mels per factor 6.4).
_LINEAR_HZ, _BREAK_HZ, _LOG_STEP = 200.0 / 3, 1000.0, math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: float) -> float:
    if mel < _BREAK_HZ / _LINEAR_HZ:
        return mel * _LINEAR_HZ
    return _BREAK_HZ * math.exp(_LOG_STEP * (mel - _BREAK_HZ / _LINEAR_HZ))
