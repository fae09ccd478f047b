"""Optional inputs of a clip besides picture and sound: a control video, masks of the latents kept clean, and the face.

Owns the mapping from pixels and seconds to the latent grid. A latent is kept clean only if the mask
covers it completely, because a part of a latent cannot be clean.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.data.prepare import pictures
from ltx_train.data.prepare.media import Part, read_pixels
from ltx_train.diffusion import positions
from ltx_train.diffusion.grid import FRAMES_PER_LATENT, PIXELS_PER_LATENT, Bucket

_SPAN = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*-\s*(\d+\.?\d*|\.\d+)\s*")
_WHITE = 128


def control(path: Path, part: Part, scale: int, stride: int) -> Tensor:
    """Pixels (F, H, W, 3) uint8 of a control video, `scale` times smaller than the clip's bucket: its frames 0, 1,
    1 + stride, 1 + 2 * stride, ...

    Frame 0 is a latent of its own, and the reference implementation takes the first frame behind it too. DataError when
    the size or the number of frames is not on the latent grid.
    """
    width, height, frames = part.bucket.width, part.bucket.height, part.bucket.frames
    if width % (PIXELS_PER_LATENT * scale) or height % (PIXELS_PER_LATENT * scale):
        raise DataError(
            f"{path}: {width}x{height} divided by data.reference_scale={scale} is not a multiple of "
            f"{PIXELS_PER_LATENT} pixels"
        )
    if (frames - 1) % (FRAMES_PER_LATENT * stride):
        wanted = f"{FRAMES_PER_LATENT * stride} * n + 1 frames"
        raise DataError(f"{path}: data.reference_stride={stride} needs {wanted}, and the bucket has {frames}")
    smaller = Bucket(width // scale, height // scale, frames)
    pixels = read_pixels(path, replace(part, bucket=smaller))
    return torch.cat([pixels[:1], pixels[1::stride]])


def video_mask(path: Path, part: Part) -> Tensor:
    """Mask (F, H, W) on the latent grid: 1 (kept clean) where the mask video is white over the whole latent, else 0."""
    white = (read_pixels(path, part).float().mean(dim=-1) >= _WHITE).float()
    cells = 1 - F.max_pool2d(1 - white[:, None], PIXELS_PER_LATENT)[:, 0]
    # The first latent frame covers one pixel frame, every later one eight.
    later = cells[1:].unflatten(0, (-1, FRAMES_PER_LATENT)).amin(dim=1) if len(cells) > 1 else cells[1:]
    return torch.cat([cells[:1], later])


def face_mask(part: Part, source: tuple[int, int]) -> Tensor:
    """Mask (F, H, W) on the latent grid: the share of a latent's area that the face's box covers, in every frame alike.

    part: its framing has a face. source: width and height of the upright pictures.
    """
    assert part.framing.face is not None
    bucket = part.bucket
    picture = pictures.box_in_bucket(part.framing.face, source, bucket.width, bucket.height, part.framing)
    covered = torch.from_numpy(picture[..., 0]).float() / 255
    cells = F.avg_pool2d(covered[None, None], PIXELS_PER_LATENT)[0]
    return cells.expand((bucket.frames - 1) // FRAMES_PER_LATENT + 1, -1, -1)


def audio_mask(spans: str, latents: int, where: str) -> Tensor:
    """Mask (T,): 1 where a latent lies inside a span of `spans`, else 0.

    Spans are `start-end` in seconds, separated by commas or semicolons. `where` names the clip in a DataError.
    """
    bounds = positions.audio(latents)[0]
    mask = torch.zeros(latents)
    for text in (part for part in re.split(r"[;,]", spans) if part.strip()):
        match = _SPAN.fullmatch(text)
        if match is None or float(match[1]) >= float(match[2]):
            raise DataError(f"{where}: audio_mask {text!r} is not start-end in seconds, such as 0.5-1.2")
        start, end = float(match[1]), float(match[2])
        inside = (bounds[:, 0] >= start - 1e-6) & (bounds[:, 1] <= end + 1e-6)
        mask[inside] = 1
    return mask
