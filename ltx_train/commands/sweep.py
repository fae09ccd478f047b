"""`ltx-train sweep`: searches settings by held-out loss; each trial is a run, and the search itself goes on where it
stopped.

Owns what a trial is and when it is given up. optuna (its own release, not Hydra's plugin, which is pinned to an old
one) proposes values and keeps the history in a SQLite file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ltx_train import config as configuration
from ltx_train import rng
from ltx_train.commands import fit, launch, session
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit, UserError
from ltx_train.evaluation import sweep_report
from ltx_train.evaluation.sweep_report import Trial
from ltx_train.training.lock import FolderLock
from ltx_train.training.preemption import stop_before_training
from ltx_train.training.tracking import read_rows

_METRIC = "val/loss"
_RANGE = re.compile(r"(log|uniform|int)\(\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)")
_CHOICE = re.compile(r"choice\((.+)\)")
# What a trial may end with; anything else ends the search.
_GIVEN_UP = (Exit.DIVERGED,)


def run(config: Config) -> int:
    """DONE when all trials are, PREEMPTED when one was stopped: the same command continues."""
    lines = (line.partition("=") for line in config.sweep.space)
    space = {name.strip(): parse(name.strip(), text.strip()) for name, _, text in lines}
    if not space:
        raise UserError("sweep.space is empty: choose sweep=lr_rank, or name settings and their ranges")
    folder = Path(config.run.root) / config.run.experiment / f"sweep-{config.sweep.name}"
    folder.mkdir(parents=True, exist_ok=True)
    stop_before_training()
    with FolderLock(folder):
        study = _study(config, folder, space)
        while (number := _next(config, study, space)) is not None:
            code = _trial(config, study, study.trials[number])
            _report(config, study, folder)
            if code is not Exit.DONE:
                return code
    print(f"{folder / 'report.html'}: best {study.best_value:.5f} with {study.best_params}")
    return Exit.DONE


def parse(name: str, text: str) -> optuna.distributions.BaseDistribution:
    """`log(1e-5, 1e-3)`, `uniform(0, 0.1)`, `int(4, 64)` or `choice(8, 16, 32)`; UserError otherwise."""
    found, chosen = _RANGE.fullmatch(text), _CHOICE.fullmatch(text)
    try:
        if found and found[1] == "int":
            return optuna.distributions.IntDistribution(int(found[2]), int(found[3]))
        if found:
            return optuna.distributions.FloatDistribution(float(found[2]), float(found[3]), log=found[1] == "log")
        if chosen:
            options = [_plain(word.strip()) for word in chosen[1].split(",")]
            return optuna.distributions.CategoricalDistribution(options)
    except ValueError as error:
        raise UserError(f"sweep.space.{name}: {text!r}: {error}") from error
    raise UserError(f"sweep.space.{name}: {text!r} is none of log(a, b), uniform(a, b), int(a, b), choice(a, b, ...)")


def _plain(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def _study(config: Config, folder: Path, space: Mapping[str, optuna.distributions.BaseDistribution]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}", study_name=config.sweep.name, load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=config.sweep.warmup),
    )  # fmt: skip
    other = [t.number for t in study.trials if t.distributions.keys() != space.keys()]
    if other:
        raise UserError(f"{folder} holds trials of another search space: set sweep.name to start a new search")
    return study


def _next(
    config: Config, study: optuna.Study, space: Mapping[str, optuna.distributions.BaseDistribution]
) -> int | None:
    """A trial that was interrupted, else a new one, else None."""
    waiting = [t.number for t in study.trials if t.state is TrialState.RUNNING]
    if waiting:
        return waiting[0]
    count = len(study.trials)
    if count >= config.sweep.trials:
        return None
    # Keyed by the trial's number: a sampler that is seeded once proposes the same values again after a restart.
    seed = rng.key_seed(config.run.seed, "sweep", config.sweep.name, count) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(4, config.sweep.trials))
    return study.ask(dict(space)).number


def _trial(config: Config, study: optuna.Study, trial: FrozenTrial) -> Exit:
    """One run to its end, or until its held-out loss falls behind the median of the others."""
    settings = trial_config(config, trial.number, trial.params)
    folder = session.run_dir(settings)
    print(f"trial {trial.number} of {config.sweep.trials}: {trial.params} in {folder}", file=sys.stderr)
    child = launch.spawned(fit.run, settings, {})
    try:
        pruned = _watched(config, optuna.trial.Trial(study, trial._trial_id), child, folder)
    except KeyboardInterrupt:
        os.kill(child.pid, signal.SIGTERM)
        child.join()
        return Exit.PREEMPTED
    return _settled(study, trial.number, folder, launch.shell_code(child.exitcode), pruned)


def _watched(config: Config, live: optuna.trial.Trial, child: Any, folder: Path) -> bool:
    """Reports held-out losses as they are written; True when the trial was given up."""
    reported = set(live.study.trials[live.number].intermediate_values)
    pruned = False
    while child.is_alive():
        child.join(0.3)
        for row in read_rows(folder / "metrics.jsonl"):
            if _METRIC in row and int(row["step"]) not in reported:
                reported.add(int(row["step"]))
                live.report(row[_METRIC], int(row["step"]))
        if config.sweep.prune and not pruned and reported and live.should_prune() and child.is_alive():
            pruned = True
            os.kill(child.pid, signal.SIGTERM)
    return pruned


def _settled(study: optuna.Study, number: int, folder: Path, code: int, pruned: bool) -> Exit:
    values = [row[_METRIC] for row in read_rows(folder / "metrics.jsonl") if _METRIC in row]
    if pruned:
        study.tell(number, state=TrialState.PRUNED)
    elif code == Exit.DONE and values:
        study.tell(number, values[-1])
    elif code in _GIVEN_UP:
        study.tell(number, state=TrialState.FAIL)
    elif code == Exit.PREEMPTED:
        return Exit.PREEMPTED
    else:
        raise UserError(f"trial {number} ended with exit code {code}: mend that, then the same command continues it")
    return Exit.DONE


def trial_config(config: Config, number: int, values: Mapping[str, Any]) -> Config:
    """The configuration of one trial: its values, and a run id that its number alone decides."""
    path = Path(config.run.root) / config.run.experiment / f"sweep-{config.sweep.name}" / "base.yaml"
    path.write_text(configuration.dump(config))
    overrides = [f"{name}={value}" for name, value in values.items()]
    try:
        return configuration.from_file(str(path), [*overrides, f"run.id={config.sweep.name}-{number:03d}"])
    except ConfigError as error:
        raise UserError(f"trial {number}: {error}") from error


def _report(config: Config, study: optuna.Study, folder: Path) -> None:
    trials = [
        Trial(t.number, t.params, t.value, t.state.name.lower(), dict(t.intermediate_values))
        for t in study.trials
        if t.state.is_finished()
    ]
    sweep_report.write(folder / "report.html", f"{config.run.experiment}: {config.sweep.name}", trials)
    done = [t for t in trials if t.value is not None]
    if done:
        best = min(done, key=lambda t: t.value or 0.0)
        (folder / "best.yaml").write_text(best_experiment(config, best.params))


def best_experiment(config: Config, values: Mapping[str, Any]) -> str:
    """An experiment file for conf/experiment or --config-dir: the sweep's own experiment with the best values."""
    lines = [f"# @package _global_\n# The best of sweep {config.sweep.name}.\ndefaults:"]
    lines.append(f"  - {config.run.experiment}\n  - _self_" if config.run.experiment != "default" else "  - _self_")
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = value
    lines += [f"{group}: {json.dumps(settings)}" for group, settings in groups.items()]
    return "\n".join(lines) + "\n"
