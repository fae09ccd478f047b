"""Which part of a file becomes a sample, at which rate, and what is kept of its pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx_train.contracts import DataError
from ltx_train.data.prepare.media import Part, read_clip, read_pixels
from ltx_train.data.prepare.pictures import Box, Crop, Framing
from ltx_train.data.prepare.sources import Clip
from ltx_train.data.prepare.windows import Cutting, Window, Windows, of_clip
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import Sound, write_mp4

RATE = 16000
CUTTING = Cutting(
    buckets=(Bucket(64, 32, 9), Bucket(64, 32, 25)), fps=25.0, windows=Windows.first, crop=Crop.centre, sound_fps=24.0
)


def _step(frames: int) -> int:
    """Grey from frame to frame: the codec's steps are larger than one."""
    return 255 // frames


def counting(path: Path, frames: int, fps: float = 25.0, *, loud_at: float | None = None) -> Path:
    """A film whose grey counts its frames, with a sound of quiet noise and one loud second."""
    pixels = (torch.arange(frames) * _step(frames)).to(torch.uint8)[:, None, None, None].expand(-1, 32, 64, 3)
    wave = 0.01 * torch.randn(1, round(frames / fps * RATE), generator=torch.Generator().manual_seed(1))
    if loud_at is not None:
        wave[:, round(loud_at * RATE) : round((loud_at + 1) * RATE)] *= 30
    write_mp4(path, pixels, Sound(wave, RATE), fps)
    return path


def clip(path: Path, **more: object) -> Clip:
    values: dict[str, object] = {"key": "a", "video": path, "caption": "", "speaker": "s", "split": ""}
    return Clip(**(values | more))  # type: ignore[arg-type]


def numbers(window: Window, frames: int = 80) -> list[int]:
    """Which frames of a film of so many a window shows."""
    assert window.clip.video is not None
    grey = read_pixels(window.clip.video, window.part).float().mean(dim=(1, 2, 3))
    return (grey / _step(frames)).round().int().tolist()


def test_the_first_part_is_the_default_and_all_parts_follow_one_another(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 80)
    (first,) = of_clip(clip(path), CUTTING)
    assert (first.key, first.part.bucket.frames, first.given_s) == ("a", 25, pytest.approx(3.2))
    assert numbers(first) == list(range(25))
    parts = of_clip(clip(path), replace(CUTTING, windows=Windows.all))
    assert [part.key for part in parts] == ["a_000", "a_001", "a_002"]
    assert [numbers(part) for part in parts] == [list(range(n, n + 25)) for n in (0, 25, 50)]


def test_a_row_may_name_its_part_of_a_file(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 80)
    (part,) = of_clip(clip(path, start=1.0, end=1.5), CUTTING)
    assert numbers(part) == list(range(25, 34)), "only the short bucket fits into half a second"
    with pytest.raises(DataError, match=r"lasts 3.20 s, and its row starts at 9 s"):
        of_clip(clip(path, start=9.0), CUTTING)


def test_the_loudest_part_is_found_and_its_sound_is_its_own(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 200, loud_at=5.0)
    (part,) = of_clip(clip(path), replace(CUTTING, windows=Windows.loudest))
    assert part.part.start == pytest.approx(5.0, abs=0.11)
    media = read_clip(path, part.part)
    assert media.waveform is not None
    assert media.waveform.shape[1] == RATE
    assert float(media.waveform.square().mean().sqrt()) == pytest.approx(0.3, rel=0.2)
    assert numbers(part, 200)[0] == pytest.approx(round(part.part.start * 25), abs=1)


@pytest.mark.parametrize("start", [3.0, 4.5, 7.0])
def test_sound_inside_a_file_is_where_it_is_in_the_whole(tmp_path: Path, start: float) -> None:
    path = counting(tmp_path / "a.mp4", 200, loud_at=5.0)
    whole = read_clip(path, Part(bucket=Bucket(64, 32, 193), fps=25.0)).waveform
    part = read_clip(path, Part(bucket=Bucket(64, 32, 17), fps=25.0, start=start)).waveform
    assert whole is not None
    assert part is not None
    first = round(start * RATE)
    torch.testing.assert_close(part, whole[:, first : first + part.shape[1]], atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [24000 / 1001, 24.0, 30.0])
def test_a_clip_may_keep_its_own_rate(tmp_path: Path, rate: float) -> None:
    """Every frame once, at the rate that the file declares."""
    path = counting(tmp_path / "a.mp4", 40, rate)
    (part,) = of_clip(clip(path), replace(CUTTING, fps=None))
    assert part.part.fps == pytest.approx(rate, rel=1e-6)
    assert numbers(part, 40) == list(range(25))


def test_pauses_before_the_first_sound_may_be_left_out(tmp_path: Path) -> None:
    pixels = (torch.arange(80) * _step(80)).to(torch.uint8)[:, None, None, None].expand(-1, 32, 64, 3)
    wave = torch.zeros(1, round(3.2 * RATE))
    wave[:, round(1.2 * RATE) :] = 0.2 * torch.randn(1, round(2.0 * RATE), generator=torch.Generator().manual_seed(1))
    write_mp4(tmp_path / "a.mp4", pixels, Sound(wave, RATE), 25.0)
    (part,) = of_clip(clip(tmp_path / "a.mp4"), replace(CUTTING, trims=True))
    assert part.part.start == pytest.approx(1.2, abs=0.05)
    assert numbers(part)[0] in (29, 30)


def test_a_still_picture_is_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "rgb24"  # type: ignore[attr-defined]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 96, 3), 77, np.uint8), "rgb24")))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    (part,) = of_clip(clip(path), replace(CUTTING, buckets=(Bucket(64, 32, 9), Bucket(64, 32, 1))))
    assert (part.part.bucket.frames, part.part.fps) == (1, 1.0)
    assert numbers(part, 255) == [77]
    with pytest.raises(DataError, match="shortest bucket needs 9 frames"):
        of_clip(clip(path), CUTTING)


def test_sounds_alone_have_the_longest_bucket_that_they_fill(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 80)
    (part,) = of_clip(clip(path, video=None, files={"audio": path}), CUTTING)
    assert (part.part.bucket.frames, part.part.fps) == (25, 24.0)
    with pytest.raises(DataError, match=r"lasts 0.20 s, but the shortest bucket takes 0.38 s"):
        of_clip(clip(path, video=None, files={"audio": path}, end=0.2), CUTTING)


def test_a_cover_inside_a_sound_file_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"  # type: ignore[attr-defined]
        cover.disposition = av.stream.Disposition.attached_pic
        voice = container.add_stream("aac", rate=RATE, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), "rgb24").reformat(format="yuvj420p")
        container.mux([*cover.encode(picture), *cover.encode()])  # type: ignore[attr-defined]
        frame = av.AudioFrame.from_ndarray(np.full((1, 2 * RATE), 0.1, np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux([*voice.encode(frame), *voice.encode()])  # type: ignore[attr-defined]
    (part,) = of_clip(clip(path, video=None, files={"audio": path}), CUTTING)
    assert part.part.bucket.frames == 25
    assert (part.facts.fps, part.facts.width) == (0.0, 0)
    assert part.facts.seconds == pytest.approx(2.0, abs=0.1)


def columns(path: Path, framing: Framing, *, size: tuple[int, int] = (32, 32)) -> list[int]:
    """Grey by column of the first frame."""
    part = Part(bucket=Bucket(*size, 1), fps=25.0, framing=framing)
    return read_pixels(path, part)[0].float().mean(dim=(0, 2)).round().int().tolist()


def test_what_is_kept_of_a_wide_picture(tmp_path: Path) -> None:
    """A ramp from left to right, three times as wide as its bucket."""
    ramp = torch.linspace(10, 240, 96).to(torch.uint8)[None, None, :, None].expand(9, 32, 96, 3)
    write_mp4(tmp_path / "a.mp4", ramp, None, 25.0)
    first = {name: columns(tmp_path / "a.mp4", framing)[0] for name, framing in {
        "centre": Framing(), "top": Framing(crop=Crop.top),
        "left": Framing(crop=Crop.face, face=Box(0.0, 0.2, 0.1, 0.4)),
        "right": Framing(crop=Crop.face, face=Box(0.9, 0.2, 1.0, 0.4)),
        "between": Framing(crop=Crop.face, face=Box(0.5, 0.2, 0.6, 0.4)),
    }.items()}  # fmt: skip
    assert first["centre"] == first["top"] == pytest.approx(87, abs=4)
    assert first["left"] == pytest.approx(10, abs=4)
    assert first["right"] == pytest.approx(165, abs=4)
    assert first["between"] == pytest.approx(10 + 230 * (0.55 * 96 - 16) / 95, abs=4)
    with pytest.raises(DataError, match="needs the column face"):
        columns(tmp_path / "a.mp4", Framing(crop=Crop.face))


def test_a_tall_picture_keeps_its_top_or_all_of_it(tmp_path: Path) -> None:
    ramp = torch.linspace(10, 240, 96).to(torch.uint8)[None, :, None, None].expand(9, 96, 32, 3)
    write_mp4(tmp_path / "a.mp4", ramp, None, 25.0)

    def rows(crop: Crop) -> list[int]:
        part = Part(bucket=Bucket(32, 32, 1), fps=25.0, framing=Framing(crop=crop))
        return read_pixels(tmp_path / "a.mp4", part)[0].float().mean(dim=(1, 2)).round().int().tolist()

    assert rows(Crop.top)[0] == pytest.approx(10, abs=4)
    assert rows(Crop.centre)[0] == pytest.approx(87, abs=4)
    middle = read_pixels(tmp_path / "a.mp4", Part(bucket=Bucket(32, 32, 1), fps=25.0, framing=Framing(crop=Crop.pad)))[
        0
    ].float()
    assert float(middle[:, :10].max()) == float(middle[:, 22:].max()) == 0
    assert middle[:, 15, 0].round().int().tolist()[::31] == [pytest.approx(12, abs=5), pytest.approx(238, abs=5)]
