"""Pixels of real H.264 files: those of the reference implementation, which decodes to rgb24 and resizes then."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltx_train.contracts import DataError
from ltx_train.data.prepare import extras
from ltx_train.data.prepare.media import Part, read_pixels
from ltx_train.diffusion.grid import Bucket

# ffmpeg's numbers of the matrices bt709 and bt601, and of the ranges.
BT709, BT601 = 1, 5
LIMITED, FULL = 1, 2
SOURCE = (320, 192)


def picture(seed: int = 0) -> np.ndarray:
    """Smooth colours over all of [0, 255]."""
    noise = torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(seed)) * 400 - 70
    smooth = F.interpolate(noise, SOURCE[::-1], mode="bicubic")
    return np.ascontiguousarray(smooth.clamp(0, 255)[0].permute(1, 2, 0).byte().numpy())


def write(path: Path, pictures: list[np.ndarray], matrix: int = BT709, colour_range: int = LIMITED) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if colour_range == FULL else "yuv420p"
        stream.codec_context.colorspace = matrix
        for rgb in pictures:
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=colour_range)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def reference(path: Path, width: int, height: int) -> torch.Tensor:
    """(F, H, W, 3): decoded to rgb24 at the file's size, then resized in floating point."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    decoded = torch.stack(frames).permute(0, 3, 1, 2).float()
    resized = F.interpolate(decoded, (height, width), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).permute(0, 2, 3, 1)


def assert_equal_pixels(found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = found.float() - wanted
    assert float(difference.abs().mean()) < 0.5  # rounding to whole numbers alone costs 0.25
    rounded = found.float() - wanted.round()
    assert float(rounded.abs().mean()) < 0.25
    assert float(rounded.abs().max()) <= 4  # beside steep edges, by rounding between rows and columns
    assert difference.mean(dim=(0, 1, 2)).abs().max() < 0.15


@pytest.mark.parametrize("size", [(480, 288), (160, 96), (320, 192)], ids=["larger", "smaller", "equal"])
@pytest.mark.parametrize(("matrix", "colour_range"), [(BT709, LIMITED), (BT601, LIMITED), (BT709, FULL), (BT601, FULL)])
def test_pixels_are_those_of_decoding_first_and_resizing_then(
    matrix: int, colour_range: int, size: tuple[int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", [picture(n) for n in range(9)], matrix, colour_range)
    found = read_pixels(path, Part(bucket=Bucket(*size, 9), fps=25.0))
    assert_equal_pixels(found, reference(path, *size)[:9])


@pytest.mark.parametrize("grey", [20, 128, 220, 255])
def test_grey_stays_grey(grey: int, tmp_path: Path) -> None:
    """128 became 126 when swscale converted and resized in one call."""
    path = write(tmp_path / "a.mp4", [np.full((*SOURCE[::-1], 3), grey, np.uint8)] * 9)
    whole = reference(path, *SOURCE)
    found = read_pixels(path, Part(bucket=Bucket(480, 288, 9), fps=25.0))
    assert abs(float(found.float().mean()) - float(whole.mean())) < 0.01
    assert abs(float(whole.mean()) - grey) <= 1


def test_control_videos_have_the_same_pixels_and_every_so_many_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [picture(n) for n in range(17)])
    part = Part(bucket=Bucket(320, 192, 17), fps=25.0)
    found = extras.control(path, part, 2, 2)
    assert_equal_pixels(found, reference(path, 160, 96)[[0, *range(1, 17, 2)]])
    with pytest.raises(DataError, match=r"reference_stride=4 needs 32 \* n \+ 1 frames, and the bucket has 17"):
        extras.control(path, part, 2, 4)


def test_a_mask_of_another_size_keeps_its_edge(tmp_path: Path) -> None:
    """Half white, resized: every latent of the white half is kept clean, none of the other."""
    half = np.zeros((*SOURCE[::-1], 3), np.uint8)
    half[:, : SOURCE[0] // 2] = 255
    path = write(tmp_path / "a.mp4", [half] * 9)
    found = extras.video_mask(path, Part(bucket=Bucket(640, 384, 9), fps=25.0))
    assert found.shape == (2, 12, 20)
    assert float(found[:, :, :9].min()) == 1
    assert float(found[:, :, 10:].max()) == 0
