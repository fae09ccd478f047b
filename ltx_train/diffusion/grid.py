"""Buckets and the latent grid: how many latents and tokens a clip has. Numbers only; imports no torch.

The home of the VAEs' strides. The video VAE is causal: its first latent frame holds one pixel frame, every later one
eight. A token of the transformer is one latent of the video, or one latent step of the audio.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMES_PER_LATENT, PIXELS_PER_LATENT = 8, 32
AUDIO_LATENTS_PER_S = 25.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """A clip's size: width and height in pixels, multiples of 32, and 8k + 1 frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def latents(self) -> tuple[int, int, int]:
        """(F, H, W) of the video latent."""
        return latent_frames(self.frames), self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def video_tokens(self) -> int:
        frames, height, width = self.latents
        return frames * height * width

    def audio_tokens(self, fps: float) -> int:
        """Audio tokens beside the clip at `fps` frames per second."""
        return audio_latents(self.frames / fps)

    def shortened(self, share: float) -> Bucket:
        """About this share of the frames, at least one."""
        return Bucket(self.width, self.height, max(1, int((self.frames - 1) * share / 8) * 8 + 1))


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 8k + 1 pixel frames."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def audio_latents(seconds: float) -> int:
    """Audio latents of a duration: 25 per second, as at inference."""
    return round(seconds * AUDIO_LATENTS_PER_S)
