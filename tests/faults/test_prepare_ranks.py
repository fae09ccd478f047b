"""A preparation by several processes: the bytes of one, each clip once, and a kill that costs a clip a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from ltx_train.data import index
from tests.conftest import command, settings
from tests.faults.harness import children, started, wait_for

pytestmark = pytest.mark.slow
THREE = ("strategy=ddp", "strategy.devices=3", "strategy.device=cpu")


def prepare(root: Path, source: Path, *more: str) -> list[str]:
    return ["prepare", *settings(root, source), *more]


def content(root: Path) -> dict[str, bytes]:
    """Every file that readers use."""
    names = ("shards/*.tar", "contexts/*.safetensors", "items/*.safetensors", "index.safetensors")
    return {str(path.relative_to(root)): path.read_bytes() for name in names for path in sorted(root.glob(name))}


def test_three_processes_give_the_bytes_of_one(prepared: Path, clips: Path, tmp_path: Path) -> None:
    with started(prepare(tmp_path / "data", clips, *THREE), tmp_path / "log") as process:
        assert process.wait() == 0
    log = (tmp_path / "log").read_text()
    assert "16 clips encoded, 0 unchanged" in log
    assert log.count("clips encoded") == 1
    assert content(tmp_path / "data") == content(prepared)
    with started(prepare(tmp_path / "data", clips, *THREE), tmp_path / "again") as process:
        assert process.wait() == 0
    assert "0 clips encoded, 16 unchanged" in (tmp_path / "again").read_text()


def test_a_killed_process_costs_at_most_a_clip_each(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """The others end too, and the next preparation, of one process, goes on from what is there."""
    root = tmp_path / "data"
    with started(prepare(root, clips, *THREE), tmp_path / "log") as process:
        wait_for(lambda: len(list((root / "items").glob("*.safetensors"))) >= 4, process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait() == 137
    made = len(list((root / "items").glob("*.safetensors")))
    assert not (root / "index.safetensors").exists()
    assert command(*prepare(root, clips)) == 0
    assert made >= 4
    assert content(root) == content(prepared)
    assert not list(root.rglob("*.tmp-*"))


def test_faults_of_all_processes_are_one_message(clips: Path, tmp_path: Path) -> None:
    """Three broken files, found by different ranks; set aside, the rest is prepared."""
    source = tmp_path / "clips"
    shutil.copytree(clips, source)
    for name in ("speaker00_0.mp4", "speaker00_1.mp4", "speaker01_0.mp4"):
        (source / name).write_bytes(b"broken")
    with started(prepare(tmp_path / "data", source, *THREE), tmp_path / "log") as process:
        assert process.wait() == 78
    log = (tmp_path / "log").read_text()
    assert log.count("3 of 16 clips cannot be prepared (data.on_bad_clip=skip sets such clips aside)") == 1
    assert all(f"speaker0{n}.mp4 cannot be decoded" in log for n in ("0_0", "0_1", "1_0"))
    assert "Traceback" not in log
    with started(prepare(tmp_path / "data", source, *THREE, "data.on_bad_clip=skip"), tmp_path / "log") as process:
        assert process.wait() == 0
    found = index.load(tmp_path / "data")
    assert set(found.quarantined) == {"speaker00_0", "speaker00_1", "speaker01_0"}
    assert len(found.records) == 13


def test_a_table_that_is_refused_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / "CAPTIONS.json").write_text(json.dumps([{"video": "gone.mp4", "caption": "x"}]))
    with started(prepare(tmp_path / "data", tmp_path, *THREE), tmp_path / "log") as process:
        assert process.wait() == 78
    assert (tmp_path / "log").read_text().count("files do not exist") == 1
