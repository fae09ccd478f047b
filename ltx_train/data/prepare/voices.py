"""Changed recordings of a voice window: louder, duller, in noise, over music.

Pure functions of a waveform. A reference at inference comes from another microphone and another room than the target.
With variants, loudness, bandwidth and background of a voice differ from draw to draw. The strengths are this project's
choice; no measurement stands behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ltx_train import rng

# Half width of the range that gains are drawn from, in dB.
_GAIN_DB = 12.0
# Upper edge of a telephone's band in Hz, and the width over which the band ends.
_BAND_HZ, _EDGE_HZ = 3400.0, 400.0
# dB by which noise and music are below the voice.
_NOISE_DB, _MUSIC_DB = 15.0, 10.0
# A minor, F, C, G: two seconds each, in Hz.
_CHORDS = ((220.0, 261.6, 329.6), (174.6, 220.0, 261.6), (261.6, 329.6, 392.0), (196.0, 246.9, 293.7))
_CHORD_S, _DECAY_S = 2.0, 0.8


def changed(name: str, waveform: Tensor, rate: int, key: str) -> Tensor:
    """The waveform (channels, samples) under the change `name`, of the same shape. key: what keys its random numbers,
    so that a clip is changed alike by every process."""
    return CHANGES[name](waveform, rate, key)


def _gain(waveform: Tensor, _rate: int, key: str) -> Tensor:
    drawn = (2 * float(rng.uniform(0, "voice/gain", key)) - 1) * _GAIN_DB
    peak = float(waveform.abs().max())
    # No louder than full scale: clipping would be another change.
    most = -20 * math.log10(peak) if peak > 0 else 0.0
    return waveform * 10 ** (min(drawn, max(0.0, most)) / 20)


def _lowpass(waveform: Tensor, rate: int, _key: str) -> Tensor:
    frequencies = torch.fft.rfftfreq(waveform.shape[1], 1 / rate)
    kept = ((_BAND_HZ + _EDGE_HZ - frequencies) / _EDGE_HZ).clamp(0, 1)
    return torch.fft.irfft(torch.fft.rfft(waveform) * kept, n=waveform.shape[1])


def _noise(waveform: Tensor, _rate: int, key: str) -> Tensor:
    return _over(waveform, rng.normal(tuple(waveform.shape), 0, "voice/noise", key), _NOISE_DB)


def _music(waveform: Tensor, rate: int, key: str) -> Tensor:
    seconds = torch.arange(waveform.shape[1]) / rate
    shift = rng.choice(len(_CHORDS), 0, "voice/music", key)
    since = seconds.remainder(_CHORD_S)
    number = (seconds / _CHORD_S).floor().long()
    tones = torch.tensor([_CHORDS[(shift + n) % len(_CHORDS)] for n in range(int(number[-1]) + 1)])[number]
    chords = (2 * math.pi * tones * since[:, None]).sin().sum(1) * (-since / _DECAY_S).exp()
    return _over(waveform, chords.expand_as(waveform), _MUSIC_DB)


def _over(waveform: Tensor, background: Tensor, below_db: float) -> Tensor:
    """The waveform with a background whose power is `below_db` dB below its own."""
    power = waveform.square().mean() / background.square().mean()
    return waveform + background * (power * 10 ** (-below_db / 10)).sqrt()


CHANGES: Final[dict[str, Callable[[Tensor, int, str], Tensor]]] = {
    "gain": _gain, "lowpass": _lowpass, "noise": _noise, "music": _music,
}  # fmt: skip
