"""Saving: killed at every point, refused by the disk, and still never a half checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import DataError
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.background import Saver
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import command
from tests.faults.test_resume import fit, newest


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights={"w": torch.full((1000,), float(step))},
        optimizer={"state": {}, "param_groups": []},
        notes={"n": step},
    )


def killed_at(folder: Path, step: int, point: int) -> bool:
    """Saves in a process of its own that is killed at the n-th flush, copy or rename; False: it came to the end."""
    child = os.fork()
    if child == 0:
        left = point

        def counted(original):  # type: ignore[no-untyped-def]
            def call(*arguments: object, **named: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*arguments, **named)

            return call

        commit._sync = counted(commit._sync)
        commit.save_file = counted(commit.save_file)
        os.rename = counted(os.rename)
        commit.shutil.rmtree = counted(commit.shutil.rmtree)
        commit.save(folder, checkpoint(step), keep=2)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_point_of_a_save_loses_no_committed_one(tmp_path: Path) -> None:
    """And the same step can be saved afterwards."""
    for step in (1, 2):
        commit.save(tmp_path, checkpoint(step), keep=2)
    point = 0
    while killed_at(tmp_path, 3, point):
        whole = commit.committed(tmp_path)
        assert {2, 3} & {commit.load(path).step for path in whole}
        for path in whole:
            found = commit.load(path)
            assert torch.equal(found.weights["w"], torch.full((1000,), float(found.step)))
        point += 1
    assert point > 8
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000002", "step-000003"]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_half_saves_do_not_count_for_retention(tmp_path: Path) -> None:
    for number in range(5):
        half = tmp_path / f"step-{number + 10:06d}"
        half.mkdir()
        (half / "weights.safetensors").write_bytes(b"cut")
    for step in (1, 2, 3):
        commit.save(tmp_path, checkpoint(step), keep=2)
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000002", "step-000003"]


def refusing(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    original = commit.save

    def save(folder: Path, saved: Checkpoint, keep: int, protected: int | None) -> Path:
        if saved.step in steps:
            raise DataError(f"the checkpoint of step {saved.step} could not be written to {folder} (no space left)")
        return original(folder, saved, keep, protected)

    monkeypatch.setattr(commit, "save", save)


def test_a_save_that_fails_is_reported_and_the_run_goes_on(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing(monkeypatch, range(2, 4))
    arguments = fit(prepared, clips, tmp_path, "optim.steps=5", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments, "checkpoint.keep=9") == 0
    error = capsys.readouterr().err
    assert "no space left); training goes on (1 in a row)" in error
    assert "training goes on (2 in a row)" in error
    run = tmp_path / "audio_reference" / "main"
    assert [p.name[-1] for p in commit.committed(run / "checkpoints")] == ["1", "4", "5"]
    assert [row.get("run/failed_saves") for row in read_rows(run / "metrics.jsonl")] == [None, None, None, 1, 2]


def test_a_disk_that_is_too_slow_for_the_interval_is_said_once_and_counted(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every save ends 1.1 s after training has begun to wait for it, however long a step takes on this machine."""
    original, start, wait = commit.save, Saver.start, Saver.wait
    is_awaited = threading.Event()

    def save(folder: Path, saved: Checkpoint, keep: int, protected: int | None) -> Path:
        is_awaited.wait(60)
        time.sleep(1.1)
        return original(folder, saved, keep, protected)

    def starting(saver: Saver, live: Checkpoint, protected: int | None) -> None:
        is_awaited.clear()
        start(saver, live, protected)

    def waiting(saver: Saver) -> None:
        is_awaited.set()
        wait(saver)

    monkeypatch.setattr(commit, "save", save)
    monkeypatch.setattr(Saver, "start", starting)
    monkeypatch.setattr(Saver, "wait", waiting)
    arguments = fit(prepared, clips, tmp_path, "optim.steps=4", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments) == 0
    error = capsys.readouterr().err
    assert error.count("s for the previous save, which took longer than") == 1
    assert "raise checkpoint.interval (1) or use a faster disk" in error
    rows = read_rows(tmp_path / "audio_reference" / "main" / "metrics.jsonl")
    first, *waited = [row["perf/save_blocked_s"] for row in rows if "perf/save_blocked_s" in row]
    assert first < min(waited)
    assert min(waited) >= 1.1


@pytest.mark.parametrize(("steps", "last"), [(range(2, 9), 1), (range(5, 6), 4)])
def test_three_failures_in_a_row_or_one_at_the_end_stop_the_run(
    steps: range, last: int, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, steps)
    arguments = fit(prepared, clips, tmp_path, "optim.steps=5", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments) == 78
    assert newest(tmp_path / "audio_reference" / "main").name == f"step-{last:06d}"
    monkeypatch.undo()
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    assert command(*arguments) == 0
    assert len(read_rows(tmp_path / "audio_reference" / "main" / "metrics.jsonl")) == 5
