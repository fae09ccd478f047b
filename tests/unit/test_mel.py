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
    mono, quad = torch.randn(1, 8), torch.randn(4, 8)
    assert torch.equal(mel.to_stereo(mono), mono.expand(2, 8))
    assert torch.equal(mel.to_stereo(quad)[0], quad.mean(0))
    stereo = torch.randn(3, 2, 8)
    assert mel.to_stereo(stereo) is stereo


def test_surround_is_mixed_down_by_weights() -> None:
    """By hand: left + 0.707 centre + 0.707 of each surround channel on its side; low frequencies are left out."""
    left, right, centre, low, back_left, back_right, side_left, side_right = torch.randn(8, 16)
    five = mel.to_stereo(torch.stack([left, right, centre, low, back_left, back_right]))
    torch.testing.assert_close(five[0], (left + 0.707 * centre + 0.707 * back_left) / 2.414)
    torch.testing.assert_close(five[1], (right + 0.707 * centre + 0.707 * back_right) / 2.414)
    seven = mel.to_stereo(torch.stack([left, right, centre, low, back_left, back_right, side_left, side_right]))
    torch.testing.assert_close(seven[0], (left + 0.707 * (centre + back_left + side_left)) / 3.121)
    torch.testing.assert_close(seven[1], (right + 0.707 * (centre + back_right + side_right)) / 3.121)


def test_short_and_empty_sounds_have_a_spectrum() -> None:
    for samples in (0, 1, 400):
        found = mel.log_mel(torch.zeros(1, 2, samples))
        assert bool(torch.isfinite(found).all())
        assert found.shape[3] == mel.MEL_BINS
