"""A long recording becomes clips: scenes, pauses, subtitles, findings; and a real recording."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from ltx_train.data import index
from ltx_train.data.footage import looking, writer
from ltx_train.data.prepare.media import Part, probe, read_clip
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import Sound, write_mp4
from tests.conftest import REPOSITORY, TINY, command
from tests.faults.test_real_media import CACHE, PYPI, from_pypi

pytestmark = pytest.mark.slow
RATE, SIZE = 48000, 64


def talk(path: Path, names: list[str], pause_s: float = 0.8) -> Path:
    """Clips of speakers one after the other, each with a pause behind its sound."""
    pixels, waves = [], []
    for name in names:
        media = read_clip(REPOSITORY / "data/sample" / f"{name}.mp4", Part(bucket=Bucket(SIZE, SIZE, 33), fps=25.0))
        assert media.pixels is not None
        assert media.waveform is not None
        still = round(pause_s * 25)
        pixels.append(torch.cat([media.pixels, media.pixels[-1:].expand(still, -1, -1, -1)]))
        waves.append(torch.cat([media.waveform[:1], torch.zeros(1, round(still / 25 * media.rate))], dim=1))
    write_mp4(path, torch.cat(pixels), Sound(torch.cat(waves, dim=1), RATE), 25.0)
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "captions.csv").read_text().splitlines()))


def test_a_recording_is_cut_at_scenes_and_told_by_its_subtitles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is what prepare reads; a second cut does not overwrite it."""
    source = talk(tmp_path / "talk.mp4", ["speaker00_0", "speaker05_0", "speaker00_1"])
    length = 33 / 25 + 0.8
    (tmp_path / "talk.srt").write_text(
        "".join(
            f"{n}\n00:00:0{n * length + 0.1:.3f} --> 00:00:0{n * length + 1.2:.3f}\nsentence {n}\n\n" for n in range(3)
        )
    )
    out = tmp_path / "clips"
    words = [f"cut.source={source}", f"cut.out={out}", "cut.shortest_s=1.3", "cut.longest_s=3", "cut.speaker=anna"]
    assert command("cut", *words) == 0
    rows = rows_of(out)
    assert [row["caption"] for row in rows] == ["sentence 0", "sentence 1", "sentence 2"]
    assert {row["speaker"] for row in rows} == {"anna"}
    assert sorted(path.name for path in out.iterdir()) == ["captions.csv", *(f"talk_{n:03d}.mp4" for n in range(3))]
    for number, row in enumerate(rows):
        facts = probe(out / row["video"])
        assert 1.24 <= facts.seconds <= 3.04
        assert facts.fps == pytest.approx(25)
        clip = read_clip(out / row["video"], Part(bucket=Bucket(SIZE, SIZE, 25), fps=25.0))
        assert clip.pixels is not None
        start = number * length
        given = read_clip(source, Part(bucket=Bucket(SIZE, SIZE, 25), fps=25.0, start=start))
        assert given.pixels is not None
        assert float((clip.pixels.float() - given.pixels.float()).abs().mean()) < 6, "starts in its scene"
    capsys.readouterr()
    assert command("cut", *words) == 77
    assert "captions.csv exists, maybe with captions" in capsys.readouterr().err
    where = [
        f"data.source={out}", f"data.root={tmp_path / 'prepared'}", f"model.path={TINY}", "data.buckets=[64x64x33]",
        "experiment=audio_reference", "data.reference_s=0.5",
    ]  # fmt: skip
    assert command("prepare", *where) == 0
    assert not any("cut_frame" in record.measured for record in index.load(tmp_path / "prepared").records)


def test_clips_are_the_recordings_frames_and_sound(tmp_path: Path) -> None:
    """Without scenes and speech: equal parts, whose pictures and samples are those of the recording at their time."""
    source = talk(tmp_path / "talk.mp4", ["speaker02_0", "speaker03_0"], pause_s=0.0)
    words = [f"cut.source={source}", f"cut.out={tmp_path / 'c'}", "cut.longest_s=1", "cut.shortest_s=0.5"]
    assert command("cut", *words, "cut.scenes=false", "cut.speech=false") == 0
    parts = sorted((tmp_path / "c").glob("*.mp4"))
    assert len(parts) == 3
    for number, part in enumerate(parts):
        start = number * 0.88
        found = read_clip(part, Part(bucket=Bucket(SIZE, SIZE, 17), fps=25.0))
        given = read_clip(source, Part(bucket=Bucket(SIZE, SIZE, 17), fps=25.0, start=start))
        assert found.pixels is not None
        assert given.pixels is not None
        assert float((found.pixels.float() - given.pixels.float()).abs().mean()) < 1.5
        assert found.waveform is not None
        assert given.waveform is not None
        left, right = found.waveform[0], given.waveform[0]
        assert float((left * right).sum() / (left.norm() * right.norm())) > 0.99


def test_rotated_pictures_are_upright() -> None:
    """A quarter turn to the left, as players show a phone's upright video."""
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 32:] = 255
    plain = av.VideoFrame.from_ndarray(wide, "rgb24")
    assert writer._upright(plain) is plain
    turned = writer._upright(SimpleNamespace(rotation=90, to_ndarray=lambda **_: wide)).to_ndarray(format="rgb24")
    assert turned.shape == (64, 32, 3)
    assert turned[:32].min() == 255
    assert turned[32:].max() == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 77, "cut.source is not set: give a recording"),
        (["cut.source=gone.mp4"], 78, "there is no such file or folder"),
        (["cut.source={folder}/empty"], 78, "holds no videos"),
        (["cut.source={folder}/broken.mp4"], 78, "cannot be decoded"),
        (["cut.source={folder}/short.mp4", "cut.shortest_s=9", "cut.longest_s=9"], 78, "has no piece of 9 s"),
        (["cut.source={folder}/short.mp4", "cut.shortest_s=9", "cut.longest_s=8"], 77, "is above the longest piece"),
    ],
)
def test_mistakes_are_answered(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    (tmp_path / "short.mp4").write_bytes((REPOSITORY / "data/sample/speaker00_0.mp4").read_bytes())
    given = [word.format(folder=tmp_path) for word in words]
    assert command("cut", *given, f"cut.out={tmp_path / 'out'}") == code
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_real_recording_of_a_voice_over_the_turning_earth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end in its pauses. No face is seen in the Earth by night, a part of which is nearly black."""
    monkeypatch.setattr(looking, "_PICTURES", 2)
    ((package, member),) = ((p, m) for p, m in PYPI.items() if p.startswith("gradio"))
    source = tmp_path / "world.mp4"
    CACHE.mkdir(parents=True, exist_ok=True)
    source.write_bytes(from_pypi(package, member))
    out = tmp_path / "clips"
    assert command("cut", f"cut.source={source}", f"cut.out={out}", "cut.shortest_s=1.4", "cut.longest_s=4") == 0
    rows = rows_of(out)
    assert rows
    facts = [probe(out / row["video"]) for row in rows]
    assert all(1.3 <= fact.seconds <= 4.05 for fact in facts)
    assert {row["findings"] for row in rows} == {"no face", "black"}
    assert {row["face"] for row in rows} == {""}


def test_clips_with_findings_are_named_and_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = talk(tmp_path / "talk.mp4", ["speaker00_0", "speaker05_0"])
    words = [f"cut.source={source}", "cut.shortest_s=1.3", "cut.longest_s=3"]
    assert command("cut", *words, f"cut.out={tmp_path / 'all'}") == 0
    assert "talk_001.mp4 (0:02.1): no face is seen\n" in capsys.readouterr().err
    assert [row["findings"] for row in rows_of(tmp_path / "all")] == ["no face", "no face"]
    assert command("cut", *words, f"cut.out={tmp_path / 'none'}", "cut.leave_out=[no face]") == 78
    assert "or empty cut.leave_out=['no face']" in capsys.readouterr().err
    assert not list((tmp_path / "none").glob("*"))
    assert command("cut", *words, f"cut.out={tmp_path / 'unseen'}", "cut.look=false") == 0
    assert [(row["face"], row["findings"]) for row in rows_of(tmp_path / "unseen")] == [("", "")] * 2
