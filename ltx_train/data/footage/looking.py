"""What a clip shows: faces by OpenCV's cascades, texts by RapidOCR (the extra `cut`), black and still pictures.

Owns the thresholds of the findings about a clip that was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from ltx_train.contracts import ConfigError, DataError
from ltx_train.data.findings import Remark
from ltx_train.data.footage.listening import library
from ltx_train.data.prepare import measure

Picture = NDArray[np.uint8]
Box = tuple[float, float, float, float]
BLACK, STILL, TEXT, NO_FACE = "black", "still", "text", "no face"
KINDS = (BLACK, STILL, TEXT, NO_FACE)
# Number of pictures of a clip that are searched for faces and texts, and the longer side that they are reduced to.
_PICTURES, _SIDE = 5, 1280
# The height of the pictures that are compared with each other.
_SMALL = 180
# Least confidence and least number of letters of a recognised text: stars and stripes give texts without letters. Least
# share of the picture that the texts of a picture cover together.
_READ, _LETTERS, _COVERED = 0.8, 3, 0.01
# The cascade "default" detects a face in pictures of the Earth; "alt2" does not.
_CASCADES = ("haarcascade_frontalface_alt2.xml", "haarcascade_profileface.xml")
# Least side of a face, as a share of the picture's height. Least number of overlapping detections for a face.
_SMALLEST_FACE, _TIMES = 0.06, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """black, still, faces, texts: shares of the pictures that are black, equal to the one before, have a face, have
    text. face: left, top, right, bottom in shares of the picture, where most pictures have one; None elsewhere."""

    black: float
    still: float
    faces: float
    texts: float
    face: Box | None


def look(path: Path) -> Looks:
    """DataError when the clip cannot be decoded."""
    small, large = _pictures(path)
    measured = measure.pictures(torch.from_numpy(np.stack(small)))
    boxes = [box for picture in large if (box := face(picture)) is not None]
    where = tuple(median(edge) for edge in zip(*boxes, strict=True)) if 2 * len(boxes) >= len(large) else None
    return Looks(
        black=measured["dark"], still=measured.get("still", 0.0), faces=len(boxes) / len(large),
        texts=sum(_has_text(picture) for picture in large) / len(large), face=where,
    )  # fmt: skip


def remarks(looks: Looks) -> list[Remark]:
    """The findings, each of `KINDS` at most once."""
    if looks.black > 0.1:
        return [Remark(BLACK, f"{100 * looks.black:.0f} % of the pictures are black")]
    found = [Remark(STILL, "the picture stands still")] if looks.still > 0.98 else []
    if looks.texts >= 0.5:
        found.append(Remark(TEXT, f"text on {100 * looks.texts:.0f} % of the pictures"))
    if looks.faces < 0.5:
        seen = f"a face on {100 * looks.faces:.0f} % of the pictures alone" if looks.faces else "no face is seen"
        found.append(Remark(NO_FACE, seen))
    return found


def _pictures(path: Path) -> tuple[list[Picture], list[Picture]]:
    """All pictures reduced, and some of them larger; RGB (H, W, 3)."""
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            small = [_reduced(frame, _SMALL) for frame in container.decode(stream)]
        chosen = {round((n + 0.5) * len(small) / _PICTURES - 0.5) for n in range(_PICTURES)}
        with av.open(str(path)) as container:
            frames = enumerate(container.decode(video=0))
            large = [_reduced(frame, _SIDE) for number, frame in frames if number in chosen]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{path} cannot be decoded ({error})") from error
    return small, large


def _reduced(frame: Any, side: int) -> Picture:
    scale = min(1.0, side / max(frame.width, frame.height))
    return frame.to_ndarray(format="rgb24", width=round(frame.width * scale), height=round(frame.height * scale))


def face(picture: Picture) -> Box | None:
    """The largest face, in shares of the picture."""
    grey = picture.mean(axis=-1).astype(np.uint8)
    height, width = grey.shape
    smallest = max(24, round(_SMALLEST_FACE * height))
    for detector in _detectors():
        # The profile cascade detects one side of a face; the mirrored picture shows the other.
        for mirrored, image in ((False, grey), (True, np.ascontiguousarray(grey[:, ::-1]))):
            found = detector.detectMultiScale(image, 1.1, _TIMES, minSize=(smallest, smallest))
            if len(found):
                left, top, wide, high = (int(n) for n in max(found, key=lambda box: box[2] * box[3]))
                left = width - left - wide if mirrored else left
                return left / width, top / height, (left + wide) / width, (top + high) / height
    return None


@cache
def _detectors() -> tuple[Any, ...]:
    cv2 = library("cv2")
    if not hasattr(cv2, "CascadeClassifier"):
        raise ConfigError(f"OpenCV {cv2.__version__} brings no cascades for faces: pip install 'ltx-train[cut]'")
    return tuple(cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / name)) for name in _CASCADES)


def _has_text(picture: Picture) -> bool:
    read = _reader()(picture[..., ::-1], use_cls=False)  # RapidOCR expects BGR
    if read.boxes is None:
        return False
    found = zip(read.boxes, read.scores, read.txts, strict=True)
    sure = [box for box, score, text in found if score >= _READ and sum(map(str.isalnum, text)) >= _LETTERS]
    covered = sum(float(np.prod(np.ptp(np.asarray(box), axis=0))) for box in sure)
    return covered >= _COVERED * picture.shape[0] * picture.shape[1]


@cache
def _reader() -> Any:
    # The longer side at most 960, as PaddleOCR has it. RapidOCR's own setting enlarges the shorter one to 736 at least.
    sides = {"Det.limit_type": "max", "Det.limit_side_len": 960}
    return library("rapidocr").RapidOCR(params={"Global.log_level": "critical", **sides})
