"""What must not go wrong silently: full disks, broken numbers, damaged files."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltx_train.contracts import DataError, DivergedError, Sample, StepResult
from ltx_train.data import index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader
from ltx_train.data.record import Record
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.stability.nonfinite import NonFiniteGuard
from ltx_train.training.stability.spikes import Spikes
from ltx_train.training.tracking.metrics import read_rows
from ltx_train.updates.optimizers import step_within
from tests.conftest import command
from tests.faults.test_resume import fit, newest
from tests.packing import repacked


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    def checkpoint(step: int, size: int) -> Checkpoint:
        return Checkpoint(
            step=step, weights={"w": torch.zeros(size)}, optimizer={"state": {}, "param_groups": []}, notes={}
        )

    commit.save(tmp_path, checkpoint(1, 10), keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DataError, match="step 2 could not be written"):
            commit.save(tmp_path, checkpoint(2, 1_000_000), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    commit.save(tmp_path, checkpoint(2, 1_000_000), keep=2)
    assert len(commit.committed(tmp_path)) == 2


def poison(monkeypatch: pytest.MonkeyPatch, steps: range, factor: float = float("nan")) -> None:
    """Gradients `factor` times too large, or not finite, in the given steps (from 0)."""
    from ltx_train.training.step import OptimizerStep

    original = OptimizerStep._backward

    def poisoned(step: OptimizerStep, mode: Any, batch: Any, share: float) -> StepResult:
        return original(step, mode, batch, share * factor if step.step in steps else share)

    monkeypatch.setattr(OptimizerStep, "_backward", poisoned)


def test_a_step_that_is_not_finite_changes_nothing(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, range(6, 7))
    arguments = fit(prepared, clips, tmp_path, "optim.steps=8", "checkpoint.interval=1", "eval.interval=0")
    assert command(*arguments, "checkpoint.keep=9") == 0
    assert "the gradient of step 7 is not finite: skipped (rank 0 had samples" in capsys.readouterr().err
    run = tmp_path / "audio_reference" / "main"
    for name in ("weights.safetensors", "optimizer.safetensors"):
        before, bad, after = (load_file(run / "checkpoints" / f"step-{step:06d}" / name) for step in (6, 7, 8))
        assert all(torch.equal(before[k], bad[k]) for k in before)
        assert not all(torch.equal(bad[k], after[k]) for k in bad)
    assert read_rows(run / "metrics.jsonl")[-1]["run/skipped_steps"] == 1


def test_a_spike_is_left_out_also_after_a_restart(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is usual is part of a checkpoint; without the setting, the step is taken."""
    poison(monkeypatch, range(24, 25), 1e4)
    for name, more in (("guarded", ("optim.skip_spikes=10",)), ("plain", ())):
        arguments = fit(prepared, clips, tmp_path / name, "checkpoint.interval=1", "eval.interval=0", *more)
        for last in (22, 26):
            assert command(*arguments, "checkpoint.keep=9", f"optim.steps={last}") == 0
        said = capsys.readouterr().err
        assert ("the gradient of step 25 has norm" in said) == (name == "guarded")
        saved = newest(tmp_path / name / "audio_reference" / "main").parent
        for file in ("weights.safetensors", "optimizer.safetensors"):
            before, spike, after = (load_file(saved / f"step-{step:06d}" / file) for step in (24, 25, 26))
            assert all(torch.equal(before[k], spike[k]) for k in before) == (name == "guarded")
            assert not all(torch.equal(spike[k], after[k]) for k in spike)


def test_what_is_usual_follows_accepted_norms() -> None:
    spikes = Spikes(3.0, torch.device("cpu"))
    for number in range(20):
        limit = spikes.limit()
        assert limit == torch.inf
        spikes.record(torch.tensor(float(number % 2 + 1)), limit)
    assert spikes.limit() == pytest.approx(4.5)
    for norm in (4.6, float("nan"), float("inf")):
        spikes.record(torch.tensor(norm), spikes.limit())
    assert spikes.limit() == pytest.approx(4.5)
    for _ in range(300):
        spikes.record(torch.tensor(4.0), spikes.limit())
    again = Spikes(3.0, torch.device("cpu"))
    again.restore(spikes.state())
    assert again.limit() == spikes.limit() == pytest.approx(11.8, abs=0.1)


@pytest.mark.parametrize(("interval", "last"), [(5, 10), (1, 10), (100, 0)])
def test_numbers_that_stay_not_finite_stop_the_run(
    interval: int,
    last: int,
    prepared: Path,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After five in a row; what was saved on the way is what step 6 had left."""
    poison(monkeypatch, range(6, 100))
    assert command(*fit(prepared, clips, tmp_path, f"checkpoint.interval={interval}", "eval.interval=0")) == 79
    assert "the gradient of step 11 is not finite, 5 in a row" in capsys.readouterr().err
    run = tmp_path / "audio_reference" / "main"
    if last == 0:
        assert not (run / "checkpoints").exists()
        return
    kept = newest(run)
    assert kept.name == f"step-{last:06d}"
    assert all(bool(torch.isfinite(w).all()) for w in commit.load(kept).weights.values())


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_gradient_norm_skips_the_update(fused: bool) -> None:
    """By torch's fused kernel on the device, or by the host."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    for bad in (False, True, False):
        before, state = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
        weight.grad = torch.full((4,), float("nan") if bad else 1.0)
        step_within(optimizer, torch.linalg.vector_norm(weight.grad))
        assert torch.equal(weight.detach(), before) == bad
        if bad:
            assert all(torch.equal(optimizer.state[weight][k], state[k]) for k in state)


def test_one_in_a_hundred_bad_steps_stops_the_run() -> None:
    guard = NonFiniteGuard()
    for step in range(1000):
        guard.record(step, ("clip",), torch.tensor(float("inf") if step % 20 == 19 else 1.0))
    with pytest.raises(DivergedError, match="11 of the last"):
        guard.check()
    assert guard.skipped == 11


def test_fit_refuses_data_that_fail_the_check(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    shard = next((root / "shards").glob("train*"))
    data = bytearray(shard.read_bytes())
    data[1500] ^= 4
    shard.write_bytes(data)
    assert command(*fit(root, clips, tmp_path / "runs")) == 78
    assert "fail the check" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "audio_reference" / "main" / "checkpoints").exists()


def test_a_sample_that_breaks_during_training_is_one_line(
    prepared: Path, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by a worker process, whose tracebacks torch would print."""
    original = Reader.sample

    def broken(reader: Reader, address: Address) -> Sample:
        if address.draw >= 1:
            raise DataError("shards/train-000000.tar: cannot read anna_1: prepare again")
        return original(reader, address)

    monkeypatch.setattr(Reader, "sample", broken)
    assert command(*fit(prepared, clips, tmp_path / "runs", "data.workers=1", "eval.interval=0")) == 78
    shown = capfd.readouterr().err
    assert "ltx-train: shards/train-000000.tar: cannot read anna_1" in shown
    assert "Traceback" not in shown


def test_clips_with_and_without_sound_train_a_mode_of_pictures(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """Batches of two, where every other clip has no sound."""
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    reader = Reader(prepared, index.load(prepared), seed=0)

    def muted(record: Record) -> dict[str, Tensor]:
        tensors = reader.tensors(reader.records[record.key])
        if int(record.key[-1]) % 2:
            del tensors["audio_latent"]
        return tensors

    repacked(root, muted)
    steps = ("mode=t2v", "adapter=video_only", "optim.steps=4", "optim.batch_size=2", "eval.interval=0")
    assert command(*fit(root, clips, tmp_path / "runs", *steps)) == 0


@pytest.mark.parametrize("share", [i / 16 for i in range(16)])
def test_every_flipped_bit_in_a_sample_is_found(share: float, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    found = index.load(prepared)
    record = found.records[0]
    place = record.tensors.offset + int(share * record.tensors.size)
    shard = tmp_path / "data" / "shards" / record.shard
    data = bytearray(shard.read_bytes())
    data[place] ^= 1 << place % 8
    shard.write_bytes(data)
    with pytest.raises(DataError, match="do not match the index"):
        Reader(tmp_path / "data", found, seed=0).tensors(record)


def test_a_full_disk_while_preparing_loses_nothing(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import settings

    where = settings(tmp_path / "data", clips)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Items of a clip are about 10 kB, the shard is larger than the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        assert command("prepare", *where) == 78
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert "the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "data" / "index.safetensors").exists()
    assert command("prepare", *where) == 0
    assert "0 clips encoded, 16 unchanged" in capsys.readouterr().out
    assert not list((tmp_path / "data").rglob("*.tmp-*"))


def test_nothing_prepared_and_nothing_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = (f"data.root={tmp_path / 'none'}", f"run.root={tmp_path}")
    assert command("fit", *here) == 78
    assert "run `ltx-train prepare`" in capsys.readouterr().err
    assert command("export", *here) == 78
    assert "run `ltx-train fit` first" in capsys.readouterr().err
    assert command("inspect") == 77
    assert command("frobnicate") == 77
    assert command("chek") == 77
    assert "did you mean 'check'" in capsys.readouterr().err
