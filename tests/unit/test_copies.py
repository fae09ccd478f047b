"""Copies of a recording, also re-encoded ones; and what stands between copies and mere likeness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ltx_train.data import copies, index
from ltx_train.data.prepare.media import Part, read_clip
from ltx_train.data.reader import Reader
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import Sound, write_mp4
from tests.conftest import command, settings


def again(source: Path, target: Path) -> None:
    """The clip decoded and encoded once more."""
    media = read_clip(source, Part(bucket=Bucket(64, 64, 33), fps=25.0))
    assert media.waveform is not None
    write_mp4(target, media.pixels, Sound(media.waveform, media.rate), 25.0)


def test_bundled_clips_are_no_copies_of_each_other(prepared: Path) -> None:
    found = index.load(prepared)
    reader = Reader(prepared, found, seed=0)
    signatures = {r.key: copies.signature(reader.tensors(r)) for r in found.records}
    assert None not in signatures.values()
    assert list(copies.pairs(found, {k: s for k, s in signatures.items() if s is not None})) == []


@pytest.mark.slow
def test_copies_across_the_splits_are_an_error_and_within_one_a_warning(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "clips", tmp_path / "data"
    shutil.copytree(clips, source)
    rows = json.loads((source / "CAPTIONS.json").read_text())["captions"]
    for row in rows:
        row["split"] = "heldout" if row["speaker"] in ("speaker06", "speaker07") else "train"
    again(source / "speaker00_0.mp4", source / "spy.mp4")
    shutil.copy(source / "speaker01_0.mp4", source / "twin.mp4")
    rows.append({"file": "spy.mp4", "caption": "x", "speaker": "spy", "split": "heldout"})
    rows.append({"file": "twin.mp4", "caption": "x", "speaker": "speaker01", "split": "train"})
    (source / "CAPTIONS.json").write_text(json.dumps({"captions": rows}))
    assert command("prepare", *settings(root, source)) == 0
    capsys.readouterr()
    assert command("check", *settings(root, source), "check.previews=0") == 78
    lines = [line for line in capsys.readouterr().out.splitlines() if "one recording" in line]
    assert len(lines) == 2
    assert lines[0].startswith("ERROR   speaker00_0 and spy are one recording, in both splits")
    assert lines[1].startswith("warning speaker01_0 and twin are one recording: leave one out")
