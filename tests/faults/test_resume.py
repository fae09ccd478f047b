"""Interrupt and rerun: the same command continues, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ltx_train.contracts import DataError
from ltx_train.data.module import ShardData
from ltx_train.training.checkpoints import commit
from ltx_train.training.stability import coded_products
from ltx_train.training.step import Task
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command, settings
from tests.faults.harness import started, wait_for

STEPS, STOP = 30, 13
KEYS = ("train/loss", "train/loss_video", "train/loss_audio", "train/grad_norm", "optim/lr", "val/loss")


def fit(prepared: Path, clips: Path, runs: Path, *more: str) -> list[str]:
    return [
        "fit", *settings(prepared, clips), f"run.root={runs}", f"optim.steps={STEPS}", "optim.batch_size=2",
        "logger.every=1", "checkpoint.interval=50", "eval.interval=10", "eval.sigmas=[0.5]",
        "eval.max_samples=3", *more,
    ]  # fmt: skip


def curve(run: Path) -> list[tuple[float, ...]]:
    return [tuple(row[k] for k in KEYS if k in row) for row in read_rows(run / "metrics.jsonl")]


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize(
    "variant", [("memory.keep=inputs",), ("memory=none", "optim=adamw", "mode=t2av", "optim.global_batch=4")]
)
def test_stopped_at_13_of_30_equals_an_unbroken_run(
    variant: tuple[str, ...], prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss curve, adapter, moments; dropout 0.05, int8 weights and 8-bit moments in the first variant."""
    assert command(*fit(prepared, clips, tmp_path / "whole", *variant)) == 0
    _stop_after(monkeypatch, STOP)
    broken = fit(prepared, clips, tmp_path / "broken", *variant)
    assert command(*broken) == 75
    run = tmp_path / "broken" / "audio_reference" / "main"
    assert newest(run).name == f"step-{STOP:06d}"
    monkeypatch.undo()
    monkeypatch.chdir(REPOSITORY)
    assert command(*broken) == 0
    whole = tmp_path / "whole" / "audio_reference" / "main"
    assert len(curve(whole)) == STEPS
    assert curve(run) == curve(whole)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        first, second = load_file(newest(whole) / name), load_file(newest(run) / name)
        assert first.keys() == second.keys()
        assert all(bool((first[k] == second[k]).all()) for k in first)


def test_a_continued_run_multiplies_as_it_began(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers whose 8-bit products are too far off are measured once, in the first pass of a run. `evaluate` multiplies
    as the run did, too."""
    fewer = (
        "optim.steps=4", "eval.interval=4", "memory.compute=int8", "memory.quantize=int8", "memory.stream_blocks=1",
        "memory.compile=off",
    )  # fmt: skip
    monkeypatch.setattr(coded_products, "MOST", 0.012)
    assert command(*fit(prepared, clips, tmp_path / "whole", *fewer)) == 0
    assert "multiplied with dequantized weights: " in capsys.readouterr().err
    _stop_after(monkeypatch, 2)
    broken = fit(prepared, clips, tmp_path / "broken", *fewer)
    assert command(*broken) == 75
    run = tmp_path / "broken" / "audio_reference" / "main"
    chosen = commit.load(newest(run)).notes["dense_products"]
    assert 0 < len(chosen) < 24
    monkeypatch.undo()
    monkeypatch.chdir(REPOSITORY)
    capsys.readouterr()
    assert command(*broken) == 0
    assert "8-bit products: off by" not in capsys.readouterr().err, "not measured again"
    assert curve(run) == curve(tmp_path / "whole" / "audio_reference" / "main")
    assert commit.load(newest(run)).notes["dense_products"] == chosen
    assert command("evaluate", *broken[1:]) == 0
    of_run, of_evaluate = (row for row in read_rows(run / "metrics.jsonl") if "val/loss" in row)
    assert of_evaluate["val/loss"] == of_run["val/loss"]


def _stop_after(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Real signals to this process while the given step runs."""

    original = Task.training_step

    def step_and_signal(task: Task, *arguments: object) -> object:
        if task.step_of_run.step == step - 1:
            for number in numbers or (signal.SIGTERM,):
                os.kill(os.getpid(), number)
        return original(task, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Task, "training_step", step_and_signal)


def test_a_second_ctrl_c_stops_without_a_save(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stop_after(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    assert command(*fit(prepared, clips, tmp_path, "checkpoint.interval=2", "eval.interval=0")) == 75
    assert newest(tmp_path / "audio_reference" / "main").name == "step-000002"
    shown = capsys.readouterr().err
    assert "ltx-train: stopped" in shown
    assert "Traceback" not in shown


def test_a_closed_terminal_loses_nothing(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after(monkeypatch, 4, signal.SIGHUP)
    assert command(*fit(prepared, clips, tmp_path, "eval.interval=0")) == 75
    assert newest(tmp_path / "audio_reference" / "main").name == "step-000004"


TWO_PASSES = ("optim.batch_size=1", "optim.global_batch=2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_trainer_starts_is_a_preemption(
    number: signal.Signals, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own handler of SIGTERM is in force there. Left to itself it ends the process behind the first
    batch, in the middle of a step of several, with exit code 0."""
    plain = ShardData.train_dataloader

    def opened(data: ShardData) -> object:
        os.kill(os.getpid(), number)
        return plain(data)

    monkeypatch.setattr(ShardData, "train_dataloader", opened)
    assert command(*fit(prepared, clips, tmp_path, "eval.interval=0", *TWO_PASSES)) == 75
    assert newest(tmp_path / "audio_reference" / "main").name == "step-000001"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_continues(number: signal.Signals, prepared: Path, clips: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM lose nothing and exit 75; SIGKILL loses at most the steps since the last save."""
    arguments = fit(prepared, clips, tmp_path, "optim.steps=400", "checkpoint.interval=5", "eval.interval=0")
    metrics = tmp_path / "audio_reference" / "main" / "metrics.jsonl"
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: len(read_rows(metrics)) >= 8, process)
        process.send_signal(number)
        code = process.wait()
    assert code == (-9 if number == signal.SIGKILL else 75)
    done = int(newest(metrics.parent).name[5:])
    rows = len(read_rows(metrics))
    assert done == rows if code == 75 else rows - 5 <= done <= rows
    assert command(*arguments, f"optim.steps={done + 2}") == 0
    assert [row["step"] for row in read_rows(metrics)] == list(range(1, done + 3))


def test_loader_workers_change_nothing_and_survive_ctrl_c(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """The whole process group gets the signal, as from a terminal or a scheduler."""
    here = ("eval.interval=0", "memory=none")
    assert command(*fit(prepared, clips, tmp_path / "none", "optim.steps=4", *here)) == 0
    workers = fit(prepared, clips, tmp_path / "two", "data.workers=2", *here)
    run = tmp_path / "two" / "audio_reference" / "main"
    with started([*workers, "optim.steps=400"], tmp_path / "log") as process:
        wait_for(lambda: len(read_rows(run / "metrics.jsonl")) >= 5, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 75
    assert "Traceback" not in (tmp_path / "log").read_text()
    none = tmp_path / "none" / "audio_reference" / "main"
    losses = [[row["train/loss"] for row in read_rows(r / "metrics.jsonl")[:4]] for r in (none, run)]
    assert losses[0] == losses[1]


def test_fit_on_a_complete_run_names_its_steps(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit(prepared, clips, tmp_path, "optim.steps=1", "eval.interval=0")
    assert command(*arguments) == 0
    capsys.readouterr()
    assert command(*arguments) == 0
    assert "is complete: 1 of 1 steps are done" in capsys.readouterr().out
    assert command(*arguments, "optim.steps=3", "run.resume=never") == 77
    assert "holds checkpoints: choose another run.id" in capsys.readouterr().err


def test_a_changed_configuration_is_refused_before_work(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit(prepared, clips, tmp_path, "optim.steps=1", "eval.interval=0")
    assert command(*arguments) == 0
    assert command(*arguments, "optim.lr=0.5", "optim.steps=3") == 77
    error = capsys.readouterr().err
    assert "optim.lr: 0.0002 -> 0.5" in error
    assert "run.id=" in error
    saved = json.dumps((tmp_path / "audio_reference/main/config.yaml").read_text())
    assert "0.5" not in saved.split("optim:")[1].split("lr:")[1][:8]


def test_a_change_that_is_meant_is_allowed(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit(prepared, clips, tmp_path, "eval.interval=0")
    assert command(*arguments, "optim.steps=2") == 0
    changed = ("optim.lr=0.5", "optim.steps=3")
    assert command(*arguments, *changed) == 77
    assert "run.allow=[optim.lr]" in capsys.readouterr().err
    assert command(*arguments, *changed, "run.allow=[optim.lr]") == 0
    output = capsys.readouterr().out
    assert "changed since the run was started: optim.lr: 0.0002 -> 0.5" in output
    assert "at step 2 from" in output
    assert ", 0 steps lost" in output
    assert read_rows(tmp_path / "audio_reference/main/metrics.jsonl")[-1]["optim/lr"] > 0.01


def test_a_checkpoint_of_the_first_release_is_read() -> None:
    """Stored when schema 1 was new; a release that cannot read it has to say so and to change the schema."""
    stored = commit.load(Path(__file__).parent / "data" / "schema-1" / "step-000007")
    assert stored.step == 7
    assert stored.weights["a.lora_A.weight"].tolist() == [[1.0, 2.0]]
    assert stored.optimizer["state"][0]["exp_avg"].tolist() == [[0.5, 0.25]]
    assert stored.optimizer["param_groups"] == [{"lr": 0.001, "params": [0]}]
    assert stored.notes["monitor"] == {"parts": {"total": [1.5]}, "steps": 1}


def test_a_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "data" / "schema-1" / "step-000007", tmp_path / "step-000007")
    manifest = tmp_path / "step-000007" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(DataError, match=r"another release \(schema 99, this one reads 1\)"):
        commit.load(tmp_path / "step-000007")
