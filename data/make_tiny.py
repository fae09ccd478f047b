"""Makes data/tiny/ltx-tiny.safetensors: a small checkpoint in the layout of the real one.

    python data/make_tiny.py [file] [--video-steps N] [--audio-steps N] [--vocoder-steps N] [--device cuda]

Both VAEs and the vocoder are trained on data/sample, so that previews and samples show faces and
let voices be heard; the transformer and the text connectors are random. The file in the
repository took nine minutes on one H200 with each step captured as a CUDA graph; this plain form is
several times slower, and much slower on a CPU. Nothing in the file comes from another model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_train.data.prepare.media import Part, read_clip
from ltx_train.diffusion.grid import Bucket
from ltx_train.model import loaders, mel, spec
from ltx_train.model.checkpoint import RandomWeights

HERE = Path(__file__).parent
FRAMES, SIZE, FPS, RATE = 33, 64, 25.0, 48000
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "tiny" / "ltx-tiny.safetensors")
    for name, steps in (("video", 17000), ("audio", 9000), ("vocoder", 5900)):
        parser.add_argument(f"--{name}-steps", type=int, default=steps)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(arguments.device)
    source = RandomWeights("tiny", 0)
    tensors = {n: source.read(n, s, torch.device("cpu")) for n, s in loaders.expected_tensors(source).items()}
    pixels, waves = read_sample()
    video, audio, vocoder = (fresh(kind, source) for kind in ("video", "audio", "vocoder"))
    train_video(video, pixels, arguments.video_steps)
    tensors |= named(video, loaders.video_vae_original_name)
    log_mels = mel.log_mel(mel.resample(waves, RATE))
    train_audio(audio, log_mels, arguments.audio_steps)
    tensors |= named(audio, loaders.audio_vae_original_name)
    train_vocoder(vocoder, waves, arguments.vocoder_steps)
    tensors |= named(vocoder, loaders.vocoder_original_name)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    metadata = {"config": json.dumps(source.config), "model_version": "2.3.0", "format": "pt"}
    save_file(stored, arguments.file, metadata)
    print(f"wrote {arguments.file}", flush=True)


def read_sample() -> tuple[Tensor, Tensor]:
    """All clips: pixels (N, 3, F, H, W) in [-1, 1], waveforms (N, 2, samples) at 48 kHz."""
    part = Part(bucket=Bucket(SIZE, SIZE, FRAMES), fps=FPS)
    media = [read_clip(p, part) for p in sorted((HERE / "sample").glob("*.mp4"))]
    pixels = torch.stack([m.pixels for m in media if m.pixels is not None]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    waves = [mel.to_stereo(m.waveform) for m in media if m.waveform is not None]
    device = torch.get_default_device()
    return pixels.to(device), torch.stack(waves).to(device)


def fresh(kind: str, source: RandomWeights) -> Any:
    """A module with the library's own initialization."""
    if kind == "video":
        return AutoencoderKLLTX2Video(**spec.video_vae(source.config))
    if kind == "audio":
        return AutoencoderKLLTX2Audio(**spec.audio_vae(source.config))
    vocoder = LTX2VocoderWithBWE(**spec.vocoder(source.config))
    window = vocoder.mel_stft.stft_fn.window_length
    vocoder.mel_stft.stft_fn.forward_basis.copy_(fourier_basis(window))
    vocoder.mel_stft.mel_basis.copy_(mel.filters(window))
    return vocoder


def fourier_basis(window: int) -> Tensor:
    """(2 * (window / 2 + 1), 1, window): real and imaginary parts of a Hann-windowed Fourier transform."""
    basis = torch.fft.rfft(torch.eye(window), dim=1).T
    return (torch.cat([basis.real, basis.imag]) * torch.hann_window(window))[:, None]


def named(module: nn.Module, original_name: Any) -> dict[str, Tensor]:
    return {original_name(name): tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def train_video(vae: Any, pixels: Tensor, steps: int) -> None:
    def reconstruct(batch: Tensor) -> Tensor:
        latent = vae.encode(batch).latent_dist.mode()
        noisy = latent + 0.05 * latent.std().detach() * torch.randn_like(latent)
        return F.mse_loss(vae.decode(noisy).sample, batch) + 1e-4 * latent.square().mean()

    optimize("video VAE", vae, lambda: reconstruct(pixels[torch.randint(len(pixels), (BATCH,))]), steps, 2e-3)
    with torch.no_grad():
        latents = torch.cat([vae.encode(p[None]).latent_dist.mode() for p in pixels])
    vae.latents_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))
    vae.latents_std.copy_(latents.std(dim=(0, 2, 3, 4)))


def train_audio(vae: Any, log_mels: Tensor, steps: int) -> None:
    def reconstruct(batch: Tensor) -> Tensor:
        latent = vae.encode(batch).latent_dist.mode()
        noisy = latent + 0.05 * latent.std().detach() * torch.randn_like(latent)
        decoded = vae.decode(noisy).sample
        return F.l1_loss(decoded, batch[:, :, : decoded.shape[2]]) + 1e-4 * latent.square().mean()

    optimize("audio VAE", vae, lambda: reconstruct(log_mels[torch.randint(len(log_mels), (BATCH,))]), steps, 2e-3)
    with torch.no_grad():
        latents = vae.encode(log_mels).latent_dist.mode().transpose(1, 2).flatten(2)
    vae.latents_mean.copy_(latents.mean(dim=(0, 1)))
    vae.latents_std.copy_(latents.std(dim=(0, 1)))


def train_vocoder(vocoder: Any, waves: Tensor, steps: int) -> None:
    """Short excerpts; spectra at several resolutions of both stages against the recordings."""
    frames = 48

    def error() -> Tensor:
        index, start = torch.randint(len(waves), (BATCH,)), torch.randint(0, 132 - frames, (BATCH,))
        place = start[:, None] * 480 + torch.arange(frames * 480)
        target = waves[index[:, None], :, place].transpose(1, 2).contiguous()
        low = mel.resample(target, RATE)
        log_mel = mel.log_mel(low)[:, :, :frames]
        first = vocoder.vocoder(log_mel)
        whole = vocoder(log_mel)
        return spectral(first, low, (128, 256, 512, 1024)) + spectral(whole, target, (256, 1024, 2048))

    optimize("vocoder", vocoder, error, steps, 1e-3)


def spectral(made: Tensor, wanted: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Distance of magnitude spectra, linear and logarithmic, averaged over window lengths."""
    length = min(made.shape[-1], wanted.shape[-1])
    total = torch.zeros(())
    for window in windows:
        a, b = (
            torch.stft(
                x[..., :length].flatten(0, 1),
                window,
                window // 4,
                window=torch.hann_window(window),
                return_complex=True,
            ).abs()
            for x in (made, wanted)
        )
        total = (
            total
            + (a - b).norm() / b.norm().clamp_min(1e-3)
            + (a.clamp_min(1e-3).log() - b.clamp_min(1e-3).log()).abs().mean()
        )
    return total / len(windows)


def optimize(name: str, module: nn.Module, loss: Any, steps: int, lr: float) -> None:
    module.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"{name} {step}/{steps}: {value.item():.4f}", flush=True)
    module.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
