"""Token positions: the interval [start, end) of every token in seconds and pixels, always float32.

The VAEs are causal: the first latent frame holds one pixel frame (one mel frame), every later one eight (four).
Knows the token grids only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltx_train.diffusion.grid import FRAMES_PER_LATENT, PIXELS_PER_LATENT

MEL_FRAMES_PER_LATENT = 4
MEL_HOP, MEL_RATE = 160, 16000


def video(latent_frames: int, latent_height: int, latent_width: int, fps: float) -> Tensor:
    """(3, F * H * W, 2): seconds, rows and columns in pixels. Tokens are ordered by frame, row, column."""
    sizes = (latent_frames, latent_height, latent_width)
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    starts = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    bounds = torch.stack([starts, starts + 1], dim=-1)
    bounds *= torch.tensor([FRAMES_PER_LATENT, PIXELS_PER_LATENT, PIXELS_PER_LATENT])[:, None, None]
    bounds[0] = (bounds[0] + 1 - FRAMES_PER_LATENT).clamp(min=0) / fps
    return bounds


def video_reference(
    latent_frames: int, latent_height: int, latent_width: int, fps: float, *, spatial_scale: int, temporal_scale: int
) -> Tensor:
    """(3, F * H * W, 2) on the axes of a target with `fps` frames per second.

    A reference whose grid is `spatial_scale` times smaller spans the same pixels. A reference with `temporal_scale`
    times fewer frames per second spans the same time, and its first frame is at the time of the target's first frame:
    t * scale - (scale - 1) / fps, at least 0.
    """
    bounds = video(latent_frames, latent_height, latent_width, fps / temporal_scale)
    bounds[0] = (bounds[0] - (temporal_scale - 1) / fps).clamp(min=0)
    bounds[1:] *= spatial_scale
    return bounds


def audio(latents: int) -> Tensor:
    """(1, latents, 2) in seconds. Multiplied and divided one after the other, as the reference implementation does: the
    rotary frequencies make the rounding of a product with 0.01 visible."""
    edges = torch.arange(latents + 1, dtype=torch.float32) * MEL_FRAMES_PER_LATENT
    seconds = (edges + 1 - MEL_FRAMES_PER_LATENT).clamp(min=0) * MEL_HOP / MEL_RATE
    return torch.stack([seconds[:-1], seconds[1:]], dim=-1)[None]
