"""Layouts of sound: which are mixed down by weights, and which are averaged and named."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx_train.data.prepare.media import Part, probe, read_clip
from ltx_train.diffusion.grid import Bucket
from ltx_train.model import mel

RATE = 16000


def write(path: Path, layout: str, levels: list[float], *, named: bool = True) -> Path:
    """A clip of 12 frames whose channels have constant levels, without loss. named: whether it names the layout."""
    with av.open(str(path), "w", format="matroska") as container:
        video = container.add_stream("libx264", rate=Fraction(30000, 1001))
        video.height = video.width = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("flac" if named else "pcm_f32le", rate=RATE, layout=layout)
        for _ in range(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
        container.mux(video.encode())
        samples = np.repeat(np.array(levels, np.float32)[None], RATE // 2, 0).reshape(1, -1)
        packed = (samples * 32767).round().astype(np.int16) if named else samples
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(packed), "s16" if named else "flt", layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


@pytest.mark.parametrize(
    ("layout", "levels", "averaged", "left"),
    [
        ("stereo", [0.1, 0.2], "", 0.1),
        ("5.1", [0.1, 0.2, 0.3, 0.9, 0.4, 0.5], "", (0.1 + 0.707 * 0.3 + 0.707 * 0.4) / 2.414),
        ("5.1(side)", [0.1, 0.2, 0.3, 0.9, 0.4, 0.5], "", (0.1 + 0.707 * 0.3 + 0.707 * 0.4) / 2.414),
        ("7.1", [0.1, 0.2, 0.3, 0.9, 0.4, 0.5, 0.6, 0.7], "", (0.1 + 0.707 * (0.3 + 0.4 + 0.6)) / 3.121),
        ("quad", [0.1, 0.2, 0.3, 0.4], "quad", 0.25),
        ("6.0", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "6.0", 0.35),
        ("6 channels", [0.1, 0.2, 0.3, 0.9, 0.4, 0.5], "", (0.1 + 0.707 * 0.3 + 0.707 * 0.4) / 2.414),
    ],
)
def test_a_layout_is_mixed_down_by_its_weights_or_averaged_and_named(
    layout: str, levels: list[float], averaged: str, left: float, tmp_path: Path
) -> None:
    path = write(tmp_path / "clip.mkv", layout.replace("6 channels", "5.1"), levels, named="channels" not in layout)
    facts, media = probe(path), read_clip(path, Part(bucket=Bucket(64, 64, 9), fps=30000 / 1001))
    assert facts.averaged == averaged
    assert media.waveform is not None
    found = mel.to_stereo(media.waveform)[0]
    torch.testing.assert_close(found[100:200], torch.full((100,), left), atol=1e-4, rtol=0)
    assert facts.fps == pytest.approx(30000 / 1001, rel=1e-3)
