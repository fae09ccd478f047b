"""Saving: killed at every point, refused by the disk, and still never a half checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from ltx_train import durable
from ltx_train.contracts import Clip, DataError
from ltx_train.training import saving
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.background import Saver
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.tracking.metrics import Metrics, read_rows
from ltx_train.training.tracking.sinks import Values
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

        try:
            durable.sync = counted(durable.sync)
            commit.save_file = counted(commit.save_file)
            os.rename, os.replace = counted(os.rename), counted(os.replace)
            commit.shutil.rmtree = counted(commit.shutil.rmtree)
            commit.save(folder, checkpoint(step), keep=2)
            os._exit(0)
        finally:
            os._exit(1)  # an error must not leave this function in a second test process
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


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
    commit.remove_halves(tmp_path)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_half_saves_do_not_count_for_retention(tmp_path: Path) -> None:
    for number in range(5):
        half = tmp_path / f"step-{number + 10:06d}"
        half.mkdir()
        (half / "weights.safetensors").write_bytes(b"cut")
    for step in (1, 2, 3):
        commit.save(tmp_path, checkpoint(step), keep=2)
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000002", "step-000003"]


def refusing(monkeypatch: pytest.MonkeyPatch, tries: range) -> list[int]:
    """The saves with these numbers, counted from 0, fail. Returns the steps of all saves that were tried."""
    original, tried = commit.save, list[int]()

    def save(folder: Path, saved: Checkpoint, keep: int, protected: int | None) -> Path:
        tried.append(saved.step)
        if len(tried) - 1 in tries:
            raise DataError(f"the checkpoint of step {saved.step} could not be written to {folder} (no space left)")
        return original(folder, saved, keep, protected)

    monkeypatch.setattr(commit, "save", save)
    monkeypatch.setattr(saving, "_PAUSE_S", 0.01)
    return tried


def test_after_two_failed_saves_training_waits_for_a_good_one(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save of step 2 fails, that of step 3 fails twice and succeeds at the third try."""
    tried = refusing(monkeypatch, range(1, 4))
    arguments = fit(prepared, clips, tmp_path, "optim.steps=5", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments, "checkpoint.keep=9") == 0
    error = capsys.readouterr().err
    assert "no space left); training goes on, and the next save has to succeed" in error
    assert error.count("training waits and tries again") == 1
    assert tried == [1, 2, 3, 3, 3, 4, 5]
    run = tmp_path / "audio_reference" / "main"
    assert [p.name[-1] for p in commit.committed(run / "checkpoints")] == ["1", "3", "4", "5"]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


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


@pytest.mark.parametrize(("tries", "last"), [(range(1, 9), 1), (range(4, 9), 4)])
def test_two_failures_in_a_row_or_one_at_the_end_stop_a_run_that_must_not_wait(
    tries: range, last: int, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, tries)
    arguments = fit(prepared, clips, tmp_path, "optim.steps=5", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments, "checkpoint.on_full=stop") == 78
    assert newest(tmp_path / "audio_reference" / "main").name == f"step-{last:06d}"
    monkeypatch.undo()
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    assert command(*arguments) == 0
    assert len(read_rows(tmp_path / "audio_reference" / "main" / "metrics.jsonl")) == 5


def test_a_checkpoint_that_cannot_be_removed_ends_nothing(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a network disk where somebody reads it."""

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(commit.shutil, "rmtree", lambda path, **named: None if named else busy(path))
    arguments = fit(prepared, clips, tmp_path, "optim.steps=4", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments, "checkpoint.keep=1") == 0
    assert "could not be removed" in capsys.readouterr().err
    folder = tmp_path / "audio_reference" / "main" / "checkpoints"
    assert [p.name for p in commit.committed(folder)] == ["step-000004"]


def test_what_killed_saves_have_left_is_removed_before_the_next_save(
    prepared: Path, clips: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "audio_reference" / "main" / "checkpoints"
    (folder / "step-000010.tmp-deadbeef").mkdir(parents=True)
    arguments = fit(prepared, clips, tmp_path, "optim.steps=1", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments) == 0
    assert [p.name for p in folder.iterdir()] == ["step-000001"]


def test_metrics_rows_wait_for_room_on_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that does not fit is kept, leaves no half line, and comes with the next one."""
    metrics, limit = Metrics(tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.write(1, {"a": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))
    try:
        metrics.write(2, {"a": 2.0})
        metrics.write(3, {"a": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    metrics.write(4, {"a": 4.0})
    metrics.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("its rows are kept and written later") == 1


def test_a_tracker_that_fails_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def write(self, step: int, values: Values) -> None:
            raise KeyError("of the tracker")

        def page(self, path: Path) -> None:
            raise TimeoutError

        def media(self, step: int, clip: Clip) -> None:
            raise RuntimeError

        def close(self) -> None:
            raise ValueError

    metrics = Metrics(tmp_path, 0, [Broken()])
    metrics.write(1, {"a": 1.0})
    metrics.page(tmp_path)
    metrics.media(1, Clip("x", tmp_path))
    metrics.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    assert capsys.readouterr().err.count("Broken could not be written: KeyError") == 1
