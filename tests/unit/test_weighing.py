"""How much each part of the loss counts, and the average of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_train.contracts import StepResult
from ltx_train.diffusion.loss import Weights
from ltx_train.distributed.ranks import ALONE
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.stability.average import Average
from ltx_train.training.stability.balance import Balance
from ltx_train.training.tracking.clock import Clock
from ltx_train.training.tracking.monitor import Monitor
from ltx_train.updates.kinds import OPTIMIZERS
from ltx_train.updates.optimizers import OptimizerSettings, build_optimizer

CPU = torch.device("cpu")


def result(video: float | None, audio: float | None, count: int = 2) -> StepResult:
    parts = [None if v is None else torch.full((count,), v) for v in (video, audio)]
    return StepResult(torch.tensor(0.0), parts[0], parts[1], torch.full((count,), 0.5))


def test_without_balance_the_configured_weights_hold() -> None:
    balance = Balance(video=2.0, audio=0.5, levels="cosmap", decay=None, device=CPU)
    balance.add(result(9.0, 1.0))
    balance.step(ALONE)
    assert balance.weights == Weights(2.0, 0.5, "cosmap")
    assert balance.row() == {}


def test_balance_makes_both_modalities_pull_alike() -> None:
    """Averages by hand: first 4 and 1; then 0.9 * 4 + 0.1 * 8 = 4.4 and 0.9 + 0.1 * 3 = 1.2; mean 2.8."""
    balance = Balance(video=1.0, audio=1.0, levels="none", decay=0.9, device=CPU)
    balance.add(result(4.0, 1.0))
    balance.step(ALONE)
    first = balance.weights
    assert float(first.video) * 4.0 == pytest.approx(float(first.audio) * 1.0)
    for video, audio in ((6.0, 2.0), (10.0, 4.0)):
        balance.add(result(video, audio))
    balance.step(ALONE)
    row = balance.row()
    assert row["train/weight_video"] == pytest.approx(2.8 / 4.4)
    assert row["train/weight_audio"] == pytest.approx(2.8 / 1.2)
    again = Balance(video=1.0, audio=1.0, levels="none", decay=0.9, device=CPU)
    again.restore(balance.state())
    assert again.row() == row


def test_balance_survives_missing_modalities_and_broken_steps() -> None:
    balance = Balance(video=1.0, audio=3.0, levels="none", decay=0.5, device=CPU)
    balance.add(result(2.0, None))
    balance.step(ALONE)
    assert balance.row() == {"train/weight_video": 1.0, "train/weight_audio": 3.0}
    balance.add(result(float("nan"), 2.0))
    balance.step(ALONE)
    assert balance.row() == {"train/weight_video": 1.0, "train/weight_audio": 3.0}
    fresh = Balance(video=1.0, audio=1.0, levels="none", decay=0.5, device=CPU)
    fresh.restore(fresh.state())
    assert fresh.row() == {"train/weight_video": 1.0, "train/weight_audio": 1.0}


def test_the_average_by_hand_and_its_exchange() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average({"w": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(1)  # decay min(0.5, 2 / 11)
    assert average.tensors["w"].tolist() == pytest.approx([1 - 2 / 11] * 3)
    with average.applied():
        assert parameter.tolist() == pytest.approx([1 - 2 / 11] * 3)
    assert parameter.tolist() == [1.0] * 3
    assert average.tensors["w"].tolist() == pytest.approx([1 - 2 / 11] * 3)
    average.update(1000)
    assert average.tensors["w"].tolist() == pytest.approx([1 - 1 / 11] * 3)


def test_the_average_goes_into_checkpoints_and_is_what_is_published(tmp_path: Path) -> None:
    weights, average = {"w": torch.ones(2)}, {"w": torch.full((2,), 0.5)}
    commit.save(
        tmp_path,
        Checkpoint(step=1, weights=weights, optimizer={"state": {}, "param_groups": []}, notes={}, average=average),
        1,
    )
    loaded = commit.load(commit.committed(tmp_path)[-1])
    assert torch.equal(loaded.weights["w"], weights["w"])
    assert torch.equal(loaded.published["w"], average["w"])
    assert Checkpoint(step=1, weights=weights, optimizer={}, notes={}).published is weights


def test_the_best_checkpoint_outlives_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit.save(
            tmp_path,
            Checkpoint(step=step, weights={"w": torch.ones(1)}, optimizer={"state": {}, "param_groups": []}, notes={}),
            2,
            1,
        )
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000001", "step-000003", "step-000004"]


def test_mixed_modes_average_each_modality_over_its_own_samples() -> None:
    monitor = Monitor(1.0, 1.0)
    monitor.add(result(2.0, None, 1))
    monitor.add(result(None, 4.0, 3))
    row = monitor.row()
    assert row["train/loss_video"] == 2.0
    assert row["train/loss_audio"] == 4.0
    assert row["train/loss"] == pytest.approx((2.0 + 3 * 4.0) / 4)
    assert row["train/sigma_share/0.5-0.6"] == 1.0
    assert sum(v for k, v in row.items() if k.startswith("train/sigma_share/")) == 1.0


def test_goodput_counts_steps_that_count_against_the_runs_whole_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred seconds in, forty of them in steps; then a restart after a break of another hundred."""
    now = {"wall": 1000.0, "cpu": 0.0}
    monkeypatch.setattr("time.time", lambda: now["wall"])
    monkeypatch.setattr("time.perf_counter", lambda: now["cpu"])
    clock = Clock(1e9)
    clock.begin()
    now["cpu"] += 40
    clock.end(flops=2e10)
    now["wall"] += 100
    assert clock.row() == {"run/goodput": 0.4, "run/trained_s": 40.0, "perf/mfu": 0.5}
    saved = clock.state()
    now["wall"] += 100
    again = Clock(None)
    again.restore(saved)
    assert again.row() == {"run/goodput": 0.2, "run/trained_s": 40.0}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit", "prodigy"])
def test_every_optimizer_descends(name: str) -> None:
    parameter = torch.nn.Parameter(torch.full((8192,), 3.0))
    optimizer = build_optimizer(
        OPTIMIZERS[name],
        [parameter],
        OptimizerSettings(lr=1.0 if name == "prodigy" else 0.1, betas=(0.9, 0.999), weight_decay=0.01),
    )
    for _ in range(150):
        parameter.grad = 2 * parameter.detach()
        optimizer.step()
    assert float(parameter.detach().abs().mean()) < 2.9
