"""Video VAE, audio VAE, mel, vocoder and text connectors of the reference implementation."""

from __future__ import annotations

import pytest
import torch

from ltx_train.model import (
    codecs,
    load_audio_vae,
    load_text_connectors,
    load_video_vae,
    load_vocoder,
    mel,
)
from tests.conftest import TINY
from tests.golden.support import assert_close, read

RATES = {"mono_16k": 16000, "mono_48k": 48000, "stereo_16k": 16000, "stereo_48k": 48000}


@pytest.mark.parametrize("case", ["clip", "crop", "image"])
def test_video_encode(case: str) -> None:
    tensors = read("video_vae")
    with torch.no_grad():
        found = codecs.encode_video(load_video_vae(TINY), tensors[f"encode.{case}.pixels"])
    assert_close(found, tensors[f"encode.{case}.latents"], 1e-5, 2e-6)


@pytest.mark.parametrize("case", ["clip", "image"])
def test_video_decode(case: str) -> None:
    tensors = read("video_vae")
    with torch.no_grad():
        found = codecs.decode_video(load_video_vae(TINY), tensors[f"decode.{case}.latents"])
    assert_close(found, tensors[f"decode.{case}.pixels"], 3e-5, 5e-6)


@pytest.mark.parametrize("case", RATES)
def test_audio_from_waveform(case: str) -> None:
    tensors = read("audio_vae")
    waveform, rate = tensors[f"encode.{case}.waveform"], RATES[case]
    resampled = mel.resample(mel.to_stereo(waveform), rate)
    if rate != mel.SAMPLE_RATE:
        assert_close(resampled, tensors[f"encode.{case}.waveform_16k"], 5e-6, 1e-5)
    assert_close(mel.log_mel(resampled), tensors[f"encode.{case}.log_mel"], 1e-4, 2e-6)
    vae = load_audio_vae(TINY)
    with torch.no_grad():
        from_mel = codecs.encode_log_mel(vae, tensors[f"encode.{case}.log_mel"])
        from_waveform = codecs.encode_audio(vae, waveform, rate)
    assert_close(from_mel, tensors[f"encode.{case}.latents"], 1e-5, 2e-6)
    assert_close(from_waveform, tensors[f"encode.{case}.latents"], 5e-5, 1e-5)
    assert torch.equal(codecs.audio_tokens(tensors[f"encode.{case}.latents"]), tensors[f"encode.{case}.tokens"])


def test_audio_decode() -> None:
    tensors = read("audio_vae")
    with torch.no_grad():
        found = codecs.decode_audio(load_audio_vae(TINY), tensors["decode.latents"])
    assert_close(found, tensors["decode.log_mel"], 1e-5, 5e-6)


@pytest.mark.parametrize("case", ["loud", "quiet"])
def test_vocoder(case: str) -> None:
    tensors = read("audio_vae")
    with torch.no_grad():
        found = load_vocoder(TINY)(tensors[f"vocoder.{case}.log_mel"])
    assert_close(found, tensors[f"vocoder.{case}.waveform_48k"], 1e-5, 5e-6)


def test_text_connectors() -> None:
    tensors = read("text_connectors")
    connectors = load_text_connectors(TINY)
    with torch.no_grad():
        video, audio, mask = connectors(tensors["left.hidden_states"], tensors["left.attention_mask"])
    assert_close(video, tensors["left.video_context"], 1e-5, 2e-6)
    assert_close(audio, tensors["left.audio_context"], 1e-5, 2e-6)
    assert torch.equal(mask, tensors["left.context_mask"])


def test_grids_and_tokens_are_inverse() -> None:
    video = torch.randn(2, 16, 3, 2, 4)
    assert torch.equal(codecs.video_grid(codecs.video_tokens(video), 3, 2, 4), video)
    audio = torch.randn(2, 2, 9, 16)
    assert torch.equal(codecs.audio_grid(codecs.audio_tokens(audio), 2), audio)
