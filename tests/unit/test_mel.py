from __future__ import annotations

import math

import pytest
import torch

from ltx_train.model import mel


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 8000])
def test_a_tone_keeps_its_pitch_and_level(rate: int) -> None:
    wave = torch.sin(2 * math.pi * 440 * torch.arange(rate) / rate)[None]
    found = mel.resample(wave, rate)
    assert found.shape == (1, 16000)
    wanted = torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)
    torch.testing.assert_close(found[0, 500:-500], wanted[500:-500], atol=2e-3, rtol=0)


def test_what_16_khz_cannot_hold_is_removed() -> None:
    wave = torch.sin(2 * math.pi * 12000 * torch.arange(48000) / 48000)[None]
    assert float(mel.resample(wave, 48000)[0, 500:-500].abs().max()) < 1e-2


def test_channels() -> None:
    mono, surround = torch.randn(1, 8), torch.randn(6, 8)
    assert torch.equal(mel.to_stereo(mono), mono.expand(2, 8))
    assert torch.equal(mel.to_stereo(surround)[0], surround.mean(0))
    stereo = torch.randn(3, 2, 8)
    assert mel.to_stereo(stereo) is stereo


def test_short_and_empty_sounds_have_a_spectrum() -> None:
    for samples in (0, 1, 400):
        found = mel.log_mel(torch.zeros(1, 2, samples))
        assert bool(torch.isfinite(found).all())
        assert found.shape[3] == mel.MEL_BINS
