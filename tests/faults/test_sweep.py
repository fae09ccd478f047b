"""A search by held-out loss: every trial a run, killed and continued, reported, and its best usable."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from ltx_train import config
from ltx_train.config.settings import all_settings
from ltx_train.contracts import ConfigError, UserError
from ltx_train.data import index
from ltx_train.data.columns import Rows
from ltx_train.evaluation.sweep_report import Trial, render
from ltx_train.jobs import search, trials
from ltx_train.training.checkpoints import commit
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command
from tests.faults.harness import started, steps_done, wait_for
from tests.faults.test_resume import fit

SPACE = "sweep.space=['optim.lr=log(1e-5, 1e-2)','adapter.rank=choice(2, 4)']"


def test_ranges() -> None:
    found = search.parse("optim.lr", "log(1e-5, 1e-3)")
    assert found == optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True)
    assert search.parse("x", "uniform(0, 0.1)") == optuna.distributions.FloatDistribution(0, 0.1)
    assert search.parse("x", "int(4, 64)") == optuna.distributions.IntDistribution(4, 64)
    assert search.parse("x", "choice(8, adamw, 0.5)") == optuna.distributions.CategoricalDistribution([8, "adamw", 0.5])
    for wrong in ("linear(1, 2)", "log(0, 1)", "log(a, 2)"):
        with pytest.raises(UserError, match=r"sweep\.space\.x"):
            search.parse("x", wrong)


def test_a_search_needs_a_space_and_known_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sweep", f"run.root={tmp_path}") == 77
    assert "sweep.space is empty" in capsys.readouterr().err
    assert command("sweep", f"run.root={tmp_path}", "sweep.space=['optim.lrr=log(1, 2)']") == 77
    assert "did you mean 'optim.lr'" in capsys.readouterr().err
    assert command("sweep", f"run.root={tmp_path}", "sweep.sampler=grid", "sweep.space=['optim.lr=log(1, 2)']") == 77
    assert "of choice(a, b, ...) alone" in capsys.readouterr().err
    assert config.compose_config(["sweep=lr_rank"]).sweep.space[1] == "adapter.rank=choice(8, 16, 32)"


def test_every_combination_once(tmp_path: Path) -> None:
    choices = "sweep.space=['optim.lr=choice(1e-4, 1e-3)','adapter.rank=choice(2, 4)']"
    made = config.compose_config(["sweep.sampler=grid", "sweep.name=all", choices])
    space = {n: search.parse(n, t) for n, t in (line.split("=", 1) for line in made.sweep.space)}
    tried: list[tuple[float, int]] = []
    while True:  # each round as after a kill
        study, wanted = search._study(made, tmp_path, space)
        number = search._next(made, study, space, wanted, set())
        if number is None:
            break
        values = study.trials[number].params
        tried.append((values["optim.lr"], values["adapter.rank"]))
        study.tell(number, 1.0)
    assert sorted(tried) == [(1e-4, 2), (1e-4, 4), (1e-3, 2), (1e-3, 4)]


def test_trials_at_a_time_have_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config.compose_config(["sweep.parallel=3", "strategy=ddp", "strategy.devices=2", "strategy.device=cuda"])
    monkeypatch.setattr(trials.resolve, "device", lambda _config: torch.device("cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [trials.visible(made, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4,5", "6,7"]
    with pytest.raises(UserError, match=r"lower sweep\.parallel"):
        trials.visible(made, 2)


@pytest.mark.slow
def test_a_search_is_continued_where_it_was_killed(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("optim.steps=8", "eval.interval=4", "checkpoint.interval=2", "sweep.trials=4", "sweep.name=try", SPACE)
    arguments = ["sweep", *fit(prepared, clips, tmp_path)[1:], *wanted]
    runs = tmp_path / "audio_reference"
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: len(commit.committed(runs / "try-001" / "checkpoints")) > 0, process)
        os.kill(process.pid, signal.SIGKILL)
    before = steps_done(runs / "try-001")
    assert before < 8
    with started(arguments, tmp_path / "log") as process:
        assert process.wait() == 0
    said = (tmp_path / "log").read_text()
    assert said.count("trial 1 of 4") == 2
    assert said.count("trial 0 of 4") == 1
    assert f"resuming {runs / 'try-001'}" in said
    states = sqlite3.connect(runs / "sweep-try" / "study.db").execute("select state from trials").fetchall()
    assert len(states) == 4
    assert {s for (s,) in states} <= {"COMPLETE", "PRUNED"}
    page = (runs / "sweep-try" / "report.html").read_text()
    assert page.count("<tr") == 5
    assert "Settings and what they gave" in page
    assert "http" not in page.replace("data:image", "")
    best = (runs / "sweep-try" / "best.yaml").read_text()
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "best.yaml").write_text(best)
    made = config.compose_config(["experiment=best"], str(tmp_path / "mine"))
    study = optuna.load_study(study_name="try", storage=f"sqlite:///{runs / 'sweep-try' / 'study.db'}")
    assert len({trial.params["optim.lr"] for trial in study.trials}) == 4
    assert (made.optim.lr, made.adapter.rank) == (study.best_params["optim.lr"], study.best_params["adapter.rank"])
    assert command(*arguments) == 0
    assert "best" in capsys.readouterr().out


@pytest.mark.slow
def test_two_trials_of_the_wandb_sweep(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch/sweeps/wandb.yaml as it is, started as W&B's agent does: its own functions fill in the command."""
    sweep = yaml.safe_load((REPOSITORY / "launch" / "sweeps" / "wandb.yaml").read_text())
    monkeypatch.setenv("PREPARED", str(prepared))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    losses: list[float] = []
    for trial, (lr, rank) in {"one": (1e-5, 8), "two": (1e-3, 16)}.items():
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        words = create_sweep_command(list(sweep["command"]))
        args = create_sweep_command_args({"args": {"optim.lr": {"value": lr}, "adapter.rank": {"value": rank}}})
        assert words[-1] == "${args_no_hyphens}"
        small = [f"run.root={tmp_path}", "logger.wandb=disabled", "optim.steps=2", "eval.interval=2"]
        subprocess.run([*words[:-1], *args["args_no_hyphens"], *small], check=True, capture_output=True)
        run = tmp_path / "wandb" / trial
        assert config.load(run / "config.yaml").adapter.rank == rank
        losses.append(read_rows(run / "metrics.jsonl")[-1][sweep["metric"]["name"]])
    assert losses[0] != losses[1]
    assert {name in all_settings() for name in sweep["parameters"]} == {True}


@pytest.mark.slow
def test_comma_lists_are_a_search(prepared: Path, tmp_path: Path) -> None:
    arguments = ["fit", str(prepared), "-m", "optim.lr=1e-4,1e-3", f"run.root={tmp_path}", "optim.steps=2"]
    with started([*arguments, "eval.interval=2"], tmp_path / "log") as process:
        assert process.wait() == 0
    assert "next: ltx-train evaluate " in (tmp_path / "log").read_text()
    runs = tmp_path / "audio_reference"
    assert len(list(runs.glob("sweep-lr-*/report.html"))) == 1
    assert {config.load(p).optim.lr for p in runs.glob("lr-*/config.yaml")} == {1e-4, 1e-3}


@pytest.mark.parametrize(
    ("change", "answer"),
    [("eval.interval=0", "eval.interval=0"), ("data.root={alone}", "nothing in {alone} is held out")],
)
def test_a_search_without_held_out_losses_is_refused(
    change: str, answer: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    loaded = index.load(prepared)
    index.save(replace(loaded, records=Rows.of([replace(record, split="train") for record in loaded.records])), alone)
    words = ["fit", str(prepared), "-m", "optim.lr=1e-4,1e-3", f"run.root={tmp_path}", change.format(alone=alone)]
    assert command(*words) == 77
    assert answer.format(alone=alone) in capsys.readouterr().err


def test_a_trial_that_the_rules_refuse_is_left_out(tmp_path: Path) -> None:
    """Choices keep their brackets; a value of the wrong type is refused by the rules, not by a traceback."""
    choice = search.parse("data.buckets", "choice([64x64x33, 64x64x65], [64x64x33])")
    assert isinstance(choice, optuna.distributions.CategoricalDistribution)
    assert choice.choices == ("[64x64x33, 64x64x65]", "[64x64x33]")
    made = config.compose_config(["experiment=audio_reference", f"run.root={tmp_path}"])
    assert search.trial_config(made, 0, {"data.buckets": choice.choices[0]}).data.buckets == ["64x64x33", "64x64x65"]
    with pytest.raises(ConfigError, match="ten"):
        search.trial_config(made, 0, {"optim.steps": "ten"})


def test_a_report_without_a_finished_trial_is_a_table() -> None:
    page = render("<x>", [Trial(number=0, params={"optim.name": "adamw"}, value=None, state="pruned", course={})])
    assert "&lt;x&gt;" in page
    assert "<img" not in page
    assert "adamw" in page
    both = [
        Trial(number=n, params={"a": v, "b": 10.0**n}, value=n / 2, state="complete", course={1: 2.0})
        for n, v in enumerate("xyx")
    ]
    assert render("t", both).count("<img") == 2
