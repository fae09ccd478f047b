"""Buckets and the latent grid: the number of latents and tokens of a clip. Imports no torch.

Defines the VAEs' strides. The video VAE is causal: its first latent frame holds one pixel frame, every later one
eight. A transformer token is one video latent or one audio latent step.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMES_PER_LATENT, PIXELS_PER_LATENT = 8, 32
AUDIO_LATENTS_PER_S = 25.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size of a clip: width and height in pixels, both multiples of 32, and 8k + 1 frames."""

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
        """Number of audio tokens of a clip at `fps` frames per second."""
        return audio_latents(self.frames / fps)

    def shortened(self, share: float) -> Bucket:
        """The bucket with about this share of the frames, at least one frame."""
        return Bucket(self.width, self.height, max(1, int((self.frames - 1) * share / 8) * 8 + 1))


def latent_frames(frames: int) -> int:
    """Number of latent frames for 8k + 1 pixel frames."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def audio_latents(seconds: float) -> int:
    """Number of audio latents for a duration: 25 per second, as at inference."""
    return round(seconds * AUDIO_LATENTS_PER_S)
