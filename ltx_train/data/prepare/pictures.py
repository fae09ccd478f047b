"""Frames at the size of a bucket: resized, cropped or padded, upright.

Owns which part of a picture is kept. It decodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ltx_train.contracts import DataError

Picture = NDArray[np.uint8]


class Crop(StrEnum):
    """What is kept of a picture of another shape than its bucket. pad: all of it, between black bars."""

    centre = "centre"
    top = "top"
    face = "face"
    pad = "pad"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in shares of the picture's width and height, from its top left corner."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def parse(cls, text: str) -> Box:
        """`left,top,right,bottom` with each in [0, 1]; ValueError for anything else."""
        edges = [float(part) for part in text.replace(";", ",").split(",")]
        if len(edges) != 4 or not (0 <= edges[0] < edges[2] <= 1 and 0 <= edges[1] < edges[3] <= 1):
            raise ValueError(f"{text!r} is not left,top,right,bottom in shares of the picture, as 0.3,0.1,0.6,0.5")
        return cls(*edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """How a clip's pictures become the bucket's size. face: where the face is."""

    crop: Crop = Crop.centre
    face: Box | None = None


def picture_to_bucket(frame: Any, width: int, height: int, framing: Framing | None = None) -> Picture:
    """A frame of PyAV as (height, width, 3) uint8. Undoes the recorder's rotation.

    As the reference implementation does it: decoded to rgb24 at its own size, then resized (bicubic, antialiased).
    swscale does both in one call, but truncates: grey 128 became 126.
    """
    framing = framing or Framing()
    turn = round(getattr(frame, "rotation", 0) / 90) % 4
    target = (height, width) if turn % 2 else (width, height)
    size = _scaled((frame.width, frame.height), target, framing)
    upright = np.rot90(_resized(frame.to_ndarray(format="rgb24"), *size), turn)
    return np.ascontiguousarray(_placed(upright, width, height, framing))


def box_in_bucket(box: Box, source: tuple[int, int], width: int, height: int, framing: Framing) -> Picture:
    """A picture (height, width, 3) that is white where a box of the source's upright pictures comes to lie.

    source: their width and height.
    """
    across, down = _scaled(source, (width, height), framing)
    picture = np.zeros((down, across, 3), np.uint8)
    top, bottom = round(box.top * down), round(box.bottom * down)
    left, right = round(box.left * across), round(box.right * across)
    picture[top:bottom, left:right] = 255
    return _placed(picture, width, height, framing)


def _scaled(source: tuple[int, int], target: tuple[int, int], framing: Framing) -> tuple[int, int]:
    """Width and height to which a picture is resized before it is cropped or padded."""
    ratios = target[0] / source[0], target[1] / source[1]
    scale, limit = (min(ratios), min) if framing.crop is Crop.pad else (max(ratios), max)
    return max(1, limit(target[0], round(source[0] * scale))), max(1, limit(target[1], round(source[1] * scale)))


def _placed(picture: Picture, width: int, height: int, framing: Framing) -> Picture:
    if framing.crop is Crop.pad:
        return _padded(picture, width, height)
    return _cropped(picture, width, height, framing)


def kept_share(picture: tuple[int, int], bucket: tuple[int, int], crop: Crop) -> float:
    """Share of a picture's pixels that its bucket shows. Both as (width, height)."""
    if crop is Crop.pad:
        return 1.0
    ratio = (picture[0] / picture[1]) / (bucket[0] / bucket[1])
    return min(ratio, 1 / ratio)


def _resized(picture: Picture, width: int, height: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    # Channels last: torch has a kernel for bytes in that order.
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _padded(picture: Picture, width: int, height: int) -> Picture:
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _cropped(picture: Picture, width: int, height: int, framing: Framing) -> Picture:
    spare = picture.shape[1] - width, picture.shape[0] - height
    if framing.crop is Crop.face:
        if framing.face is None:
            raise DataError("data.crop=face needs the column face: left,top,right,bottom in shares of the picture")
        middle = (framing.face.left + framing.face.right) / 2, (framing.face.top + framing.face.bottom) / 2
        left = round(middle[0] * picture.shape[1] - width / 2)
        top = round(middle[1] * picture.shape[0] - height / 2)
        left, top = min(max(0, left), spare[0]), min(max(0, top), spare[1])
    else:
        left, top = spare[0] // 2, 0 if framing.crop is Crop.top else spare[1] // 2
    return picture[top : top + height, left : left + width]
