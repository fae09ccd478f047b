from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_train import config
from ltx_train.assembly import from_config, model_builder, timing
from ltx_train.assembly.setup import settled
from ltx_train.contracts import DataError, StepResult, UserError
from ltx_train.diffusion import conditions, objective, transfer
from ltx_train.diffusion.loss import Weights
from ltx_train.jobs.folder_lock import FolderLock
from ltx_train.model import adapter
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.schedule import Schedule
from ltx_train.training.tracking import console, metrics
from ltx_train.training.tracking.monitor import Monitor
from ltx_train.updates.kinds import OPTIMIZERS
from ltx_train.updates.optimizers import OptimizerSettings, build_optimizer


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.55, 0.1]), ("cosine", [1.0, 0.55, 0.1])],
)
def test_schedules(kind: str, expected: list[float]) -> None:
    schedule = Schedule(kind=kind, lr=1.0, final_lr=0.1, warmup=10, steps=110)
    assert [schedule.at(step) for step in (10, 60, 110)] == pytest.approx(expected)
    assert [schedule.at(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.at(10_000) == pytest.approx(expected[-1])


HYPERPARAMETERS = OptimizerSettings(lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    """The next step after loading is bit for bit the next step without."""

    def steps(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for number in range(count):
            parameter.grad = torch.sin(parameter.detach() + number)
            optimizer.step()

    first = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = build_optimizer(OPTIMIZERS[name], [first], HYPERPARAMETERS)
    steps(first, optimizer, 3)
    commit.save(
        tmp_path,
        Checkpoint(step=3, weights={"w": first.detach().clone()}, optimizer=optimizer.state_dict(), notes={"a": [1]}),
        1,
    )
    loaded = commit.load(commit.committed(tmp_path)[-1])
    second = torch.nn.Parameter(loaded.weights["w"])
    again = build_optimizer(OPTIMIZERS[name], [second], HYPERPARAMETERS)
    again.load_state_dict(dict(loaded.optimizer))
    steps(first, optimizer, 2)
    steps(second, again, 2)
    assert torch.equal(first, second)
    assert loaded.notes == {"a": [1]}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, weights={"w": torch.ones(2)}, optimizer={"state": {}, "param_groups": []}, notes={})


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    """Half-written folders are neither loaded nor counted, and `remove_halves` clears the temporary ones away."""
    for step in (1, 2, 3):
        commit.save(tmp_path, checkpoint(step), keep=2)
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000002", "step-000003"]
    (tmp_path / "step-000009.tmp-dead").mkdir()
    (tmp_path / "step-000008").mkdir()
    (tmp_path / "step-000003" / "weights.safetensors").write_bytes(b"short")
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000002"]
    commit.save(tmp_path, checkpoint(4), keep=2)
    commit.remove_halves(tmp_path)
    assert not list(tmp_path.glob("*.tmp-*"))
    assert [p.name for p in commit.committed(tmp_path)] == ["step-000002", "step-000004"]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = commit.save(tmp_path, checkpoint(1), keep=1)
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        commit.load(path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    commit.save(tmp_path, checkpoint(1), keep=1)
    commit.save(
        tmp_path,
        Checkpoint(step=1, weights={"w": torch.zeros(2)}, optimizer={"state": {}, "param_groups": []}, notes={}),
        keep=1,
    )
    assert float(commit.load(tmp_path / "step-000001").weights["w"].sum()) == 0


def test_rows_of_steps_to_be_done_again_are_dropped(tmp_path: Path) -> None:
    written = metrics.Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        written.write(step, {"x": float(step)})
    written.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')
    metrics.Metrics(tmp_path, 2).close()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]


def result(sigma: list[float], video: list[float] | None, audio: list[float] | None) -> StepResult:
    parts = [None if p is None else torch.tensor(p) for p in (video, audio)]
    return StepResult(torch.zeros(()), parts[0], parts[1], torch.tensor(sigma))


def test_the_monitor_averages_by_modality_and_noise_level() -> None:
    monitor = Monitor(1.0, 0.5)
    monitor.add(result([0.1, 0.9], [1.0, 3.0], [2.0, 4.0]))
    monitor.step_done()
    row = monitor.row()
    assert row["train/loss"] == pytest.approx((2 + 5) / 2)
    assert row["train/loss_video"] == 2
    assert row["train/loss_audio"] == 3
    assert row["train/loss_sigma/0.00-0.25"] == pytest.approx(2)
    assert row["train/loss_sigma/0.75-1.00"] == pytest.approx(5)
    assert "train/loss_sigma/0.25-0.50" not in row


def test_an_interrupted_interval_continues_exactly() -> None:
    import json

    whole, first, second = (Monitor(1.0, 1.0) for _ in range(3))
    parts = [result([0.3], [math.pi], [1 / 3]), result([0.6], [math.e], [2 / 3])]
    for part in parts:
        whole.add(part)
    first.add(parts[0])
    second.restore(json.loads(json.dumps(first.state())))
    second.add(parts[1])
    keep = [k for k in whole.row() if k.startswith("train/")]
    whole.add(parts[0])
    whole.add(parts[1])
    expected, continued = whole.row(), second.row()
    assert [expected[k] for k in keep] == [continued[k] for k in keep]


def test_an_interrupted_interval_keeps_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of one second each. A measurement and a restart take time that no step has."""
    now = [0.0]
    monkeypatch.setattr("ltx_train.training.tracking.monitor.time.perf_counter", lambda: now[0])

    def steps(monitor: Monitor, count: int) -> None:
        monitor.begin()
        for _ in range(count):
            now[0] += 0.25
            monitor.data_arrived()
            now[0] += 0.75
            monitor.add(result([0.3], [1.0], [1.0]))
            monitor.step_done()
            monitor.batch_done()

    first, second = Monitor(1.0, 1.0), Monitor(1.0, 1.0)
    steps(first, 7)
    with first.paused():
        now[0] += 30
    before = first.state()["waited_s"]
    first.data_arrived()
    assert first.state()["waited_s"] == before, "what pauses is no wait for data"
    second.restore(first.state())
    now[0] += 60
    steps(second, 3)
    row = second.row()
    assert (row["perf/step_s"], row["perf/data_wait_s"]) == (pytest.approx(1.0), pytest.approx(0.25))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    progress = console.ConsoleProgress(4, 0)
    progress.advance(2)
    progress.row(1, 4, {"train/loss": 1.75})
    progress.row(2, 4, {"train/loss": 1.25, "val/loss": 2.5, "perf/data_wait_s": 9.0, "perf/step_s": 0.731})
    progress.close()
    shown = capsys.readouterr().err
    assert "step 1/4  loss 1.75" in shown
    assert ("0.731 s/step" in shown and " left" in shown) == terminal
    assert "step 2/4" in shown
    assert "1.25" in shown
    assert "val/loss 2.5" in shown
    assert "data_wait" not in shown
    assert ("fit" in shown) == terminal


def test_two_jobs_cannot_share_a_run(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(UserError, match=r"in use by .* pid \d+"), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


# Operations whose result, or its size, the host has to wait for.
WAITING = {
    "aten::_local_scalar_dense", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::nonzero",
    "aten::masked_select", "aten::equal", "aten::is_nonzero",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in WAITING:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("mode", ["audio_reference", "av_i2v"])
def test_nothing_in_a_step_waits_for_the_device(mode: str, dropout: float) -> None:
    """From the inputs' arrival on the device to clipped gradients, recomputation included."""
    setup = settled(config.compose_config(["experiment=audio_reference", f"mode={mode}", f"adapter.dropout={dropout}"]))
    made, transformer = setup.config, model_builder.open_trainable(setup)
    parameters = list(adapter.trainable_parameters(transformer).values())
    batch = timing.random_batch(made, 0)
    adapter.DropoutKeys(transformer).set([1])
    draws = conditions.draw(batch, made.mode, from_config.sigma_distribution(made), 0)
    inputs = transfer.to_device(conditions.assemble(batch, made.mode, draws), torch.device("cpu"))
    with Waits() as waits:
        objective.losses(transformer, inputs, Weights()).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert waits.found == []
    with Waits() as waits:
        transfer.distinct(torch.zeros(1, 3))
    assert waits.found == ["aten::_unique2"]
