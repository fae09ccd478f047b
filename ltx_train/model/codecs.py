"""Pixels and waveforms to normalized latents and back.

Owns the normalization by the checkpoint's channel statistics, and the token layout of both modalities. Knows nothing of
files, clips or training. `vae` and `vocoder` are the modules from `loaders`. They are typed `Any` because type checkers
cannot narrow the union return types of diffusers' classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltx_train.model import mel

VOCODER_RATE = 48000
LATENT_MEL_BINS = 16
_FRAMES_AT_ONCE = 16


def scaled(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pixels (F, H, W, 3) uint8 -> (1, 3, F, H, W) in [-1, 1], rounded to `dtype`."""
    frames, height, width, channels = pixels.shape
    out = torch.empty(1, channels, frames, height, width, device=device, dtype=dtype)
    # In parts: the whole clip in float32 takes 1.5 GiB at 1280x704x153.
    for start in range(0, frames, _FRAMES_AT_ONCE):
        part = pixels[start : start + _FRAMES_AT_ONCE].to(device).permute(3, 0, 1, 2)
        out[0, :, start : start + _FRAMES_AT_ONCE] = part.float() / 127.5 - 1
    return out


def unscaled(decoded: Tensor) -> Tensor:
    """(3, F, H, W), [-1, 1] after clamping -> pixels (F, H, W, 3) uint8 on the CPU."""
    parts = decoded.split(_FRAMES_AT_ONCE, dim=1)
    pixels = [((part.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu() for part in parts]
    return torch.cat(pixels)


def encode_video(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) RGB in [-1, 1] -> (B, C, 1 + (F - 1) // 8, H / 32, W / 32) normalized posterior mean.

    The largest 8k + 1 frames are encoded; later frames are dropped.
    """
    frames = (pixels.shape[2] - 1) // 8 * 8 + 1
    raw = vae.encode(pixels[:, :, :frames].to(vae.dtype)).latent_dist.mode()
    return (raw - _video(vae.latents_mean, raw)) / _video(vae.latents_std, raw)


def decode_video(vae: Any, latents: Tensor) -> Tensor:
    """Normalized latents (B, C, F, H, W) -> pixels (B, 3, 8F - 7, 32H, 32W), not clamped."""
    latents = latents.to(vae.dtype)
    raw = latents * _video(vae.latents_std, latents) + _video(vae.latents_mean, latents)
    return vae.decode(raw).sample


def encode_audio(vae: Any, waveform: Tensor, rate: int) -> Tensor:
    """(B, channels, samples) at `rate` Hz -> (B, c, T, 16) normalized posterior mean, float32.

    T = ceil((1 + samples // 160) / 4), with the number of samples after resampling to 16 kHz.
    """
    stereo = mel.resample(mel.to_stereo(waveform.float()), rate)
    return encode_log_mel(vae, mel.log_mel(stereo.to(vae.device)))


def encode_log_mel(vae: Any, log_mel: Tensor) -> Tensor:
    """(B, 2, frames, 64) -> (B, c, T, 16) normalized posterior mean."""
    raw = vae.encode(log_mel).latent_dist.mode()
    tokens = (audio_tokens(raw) - vae.latents_mean) / vae.latents_std
    return audio_grid(tokens, raw.shape[1])


def decode_audio(vae: Any, latents: Tensor) -> Tensor:
    """Normalized (B, c, T, 16) -> log-mel (B, 2, 4T - 3, 64)."""
    tokens = audio_tokens(latents.float()) * vae.latents_std + vae.latents_mean
    return vae.decode(audio_grid(tokens, latents.shape[1])).sample


def decode_waveform(vae: Any, vocoder: Any, latents: Tensor) -> Tensor:
    """Normalized (B, c, T, 16) -> waveform (B, 2, samples) at 48 kHz in [-1, 1]."""
    return vocoder(decode_audio(vae, latents))


def video_tokens(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, F * H * W, C), in the order frame, row, column."""
    return latents.flatten(2).transpose(1, 2)


def video_grid(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Inverse of `video_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


def audio_tokens(latents: Tensor) -> Tensor:
    """(B, c, T, f) -> (B, T, c * f)."""
    return latents.transpose(1, 2).flatten(2)


def audio_grid(tokens: Tensor, channels: int) -> Tensor:
    """Inverse of `audio_tokens`."""
    return tokens.unflatten(2, (channels, -1)).transpose(1, 2)


def _video(statistics: Tensor, like: Tensor) -> Tensor:
    return statistics.to(like.dtype).view(1, -1, 1, 1, 1)
