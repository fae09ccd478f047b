"""Eight clips that are bad in one way each: every one has its finding and no other; the bundled clips have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ltx_train.data import findings, index
from ltx_train.data.prepare import measure
from ltx_train.data.prepare.media import Part, read_clip
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import Sound, write_mp4
from tests.conftest import REPOSITORY, command, settings

CLIP = REPOSITORY / "data/sample/speaker00_0.mp4"
Pair = tuple[torch.Tensor, torch.Tensor, int]


def good() -> Pair:
    media = read_clip(CLIP, Part(bucket=Bucket(64, 64, 33), fps=25.0))
    assert media.pixels is not None
    assert media.waveform is not None
    return media.pixels, media.waveform, media.rate


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def square(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    times = torch.arange(wave.shape[1]) / rate
    return pixels, torch.sign(torch.sin(2 * torch.pi * 200 * times + 0.1)).expand_as(wave).clone(), rate


def half_silent(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    wave = wave.clone()
    wave[:, wave.shape[1] // 2 :] = 0
    return pixels, wave, rate


def late(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    pause = round(0.8 * rate)
    return pixels, torch.cat([torch.zeros(len(wave), pause), wave[:, :-pause]], dim=1), rate


def hissing(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    return pixels, 0.1 * noise(*wave.shape), rate


def quiet(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    return pixels, wave * 10 ** (-54 / 20) / float(wave.square().mean().sqrt()), rate


def enlarged(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    """From 16 pixels a side, in a file of 64."""
    small = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (16, 16), mode="area")
    large = F.interpolate(small, (64, 64), mode="bicubic").clamp(0, 255)
    return large.permute(0, 2, 3, 1).to(torch.uint8), wave, rate


def long(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    return pixels.repeat(3, 1, 1, 1), wave.repeat(1, 3), rate


def tall(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    """9:16, of the same content."""
    return torch.cat([pixels, pixels.flip(1)[:, :50]], dim=1), wave, rate


def cut(pixels: torch.Tensor, wave: torch.Tensor, rate: int) -> Pair:
    return torch.cat([pixels[:16], 255 - pixels[16:].flip(2)]), wave, rate


BAD: dict[str, tuple[Callable[..., Pair], str]] = {
    "square": (square, "of the sound is clipped"),
    "half": (half_silent, "of the sound is silence"),
    "late": (late, "0.8 s of silence before the first sound"),
    "hiss": (hissing, "no voice is heard"),
    "quiet": (quiet, "very quiet (-5"),
    "enlarged": (enlarged, "blurred, or enlarged before"),
    "long": (long, "1.3 of 4.0 s are used"),
    "tall": (tall, "only 56 % of the picture is used"),
    "cut": (cut, "a cut at 0.64 s"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> index.Index:
    """Those clips and some bundled ones, prepared."""
    source, root = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("prepared") / "data"
    rows = json.loads((REPOSITORY / "data/sample/CAPTIONS.json").read_text())["captions"]
    rows = rows[::5]
    for row in rows:
        shutil.copy(REPOSITORY / "data/sample" / row["file"], source)
    pixels, wave, rate = good()
    for name, (spoil, _) in BAD.items():
        picture, sound, rate_of = spoil(pixels, wave, rate)
        write_mp4(source / f"bad_{name}.mp4", picture, Sound(sound, rate_of), 25.0)
        rows.append({"file": f"bad_{name}.mp4", "caption": "x", "speaker": f"bad_{name}"})
    (source / "CAPTIONS.json").write_text(json.dumps({"captions": rows}))
    assert command("prepare", *settings(root, source)) == 0
    return index.load(root)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_clip_has_its_finding_and_only_it(name: str, measured: index.Index) -> None:
    (record,) = (r for r in measured.records if r.key == f"bad_{name}")
    (said,) = findings.of_record(record)
    assert BAD[name][1] in said.text
    (finding,) = (f for f in findings.of_clips(measured) if f"bad_{name}" in f.keys)
    assert said.text in finding.text
    assert not finding.error


@pytest.mark.slow
def test_the_bundled_clips_have_no_finding(measured: index.Index) -> None:
    bundled = [record for record in measured.records if not record.key.startswith("bad_")]
    assert len(bundled) == 16
    assert {record.key: findings.of_record(record) for record in bundled if findings.of_record(record)} == {}


def test_what_no_run_trains_is_not_named(measured: index.Index) -> None:
    named = {key for f in findings.of_clips(measured, pictures=False) for key in f.keys}
    assert named == {f"bad_{name}" for name in ("square", "half", "late", "hiss", "quiet")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sound_late_s": 0.31}, "sound 0.31 s late"),
        ({"sound_late_s": -0.2}, "sound 0.20 s early"),
        ({"enlarged": 2.0}, "enlarged 2.0 times"),
        ({"snr_db": 3.0}, "noisy (3 dB between loud and quiet parts)"),
        ({"band_hz": 3400.0}, "nothing above 3.4 kHz"),
        ({"dark": 0.5}, "50 % of the frames are black"),
        ({"still": 1.0}, "the picture stands still"),
    ],
)
def test_other_faults_are_named(change: dict[str, float], said: str, prepared: Path) -> None:
    record = index.load(prepared).records[0]
    assert findings.of_record(record) == []
    assert findings.of_record(replace(record, measured={**record.measured, **change}))[0].text == said


def test_numbers_of_known_sounds() -> None:
    """A sine of -20 dB of full scale has -23 dB RMS, and as LUFS about that; loudness of both channels adds."""
    rate = 48000
    times = torch.arange(2 * rate) / rate
    sine = 0.1 * torch.sin(2 * torch.pi * 997 * times)[None]
    found: Any = measure.sound(sine, rate)
    assert found["lufs"] == pytest.approx(-23.0, abs=0.2)
    assert found["peak_db"] == pytest.approx(-20.0, abs=0.1)
    assert found["clipped"] == found["pauses"] == found["leading_s"] == 0
    assert found["snr_db"] == pytest.approx(0, abs=0.2)
    assert measure.sound(sine.expand(2, -1), rate)["lufs"] == pytest.approx(-20.0, abs=0.2)
    assert measure.sound(0.1 * noise(1, rate), rate)["voiced"] < 0.05
    assert measure.sound(torch.sin(2 * torch.pi * 120 * times)[None], rate)["voiced"] > 0.95
    silence = measure.sound(torch.zeros(1, rate), rate)
    assert silence["leading_s"] == pytest.approx(1.0)
    assert "voiced" not in silence
    assert "lufs" not in measure.sound(sine[:, :9600], rate), "a loudness needs 0.4 s"
