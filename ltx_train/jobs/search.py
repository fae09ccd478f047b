"""Searches settings by held-out loss. Each trial is a run; a stopped search can be continued.

Owns the definition of a trial and its pruning. optuna proposes values and keeps the history in a SQLite file. It is
used directly, because Hydra's plugin is pinned to an old release of it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import yaml
from omegaconf import OmegaConf
from optuna.trial import TrialState

from ltx_train import config as configuration
from ltx_train import durable, rng
from ltx_train.assembly import from_config
from ltx_train.config import Config
from ltx_train.config.multirun import top_level_values
from ltx_train.contracts import ConfigError, Exit, UserError
from ltx_train.data import index
from ltx_train.evaluation import history, sweep_report
from ltx_train.evaluation.history import Measured
from ltx_train.evaluation.sweep_report import Trial
from ltx_train.jobs import trials
from ltx_train.jobs.folder_lock import FolderLock
from ltx_train.jobs.trials import Running
from ltx_train.training.tracking.metrics import read_rows

_METRIC = "val/loss"
_RANGE = re.compile(r"(log|uniform|int)\(\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)")
_CHOICE = re.compile(r"choice\((.+)\)")
# Exit codes that fail a trial without ending the search.
_GIVEN_UP = (Exit.DIVERGED,)
Space = Mapping[str, optuna.distributions.BaseDistribution]
# Name of the attribute that stores the SLURM job of a trial, and seconds between two polls of the trials.
_JOB, _POLL_S = "job", 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """code: DONE when all trials are done, PREEMPTED when one was stopped. folder: of the search. best: the run folder
    of the best trial, None when no trial has a result."""

    code: Exit
    folder: Path
    best: Path | None


def search(config: Config) -> Outcome:
    """Runs the remaining trials. Running the same command again continues a stopped search."""
    lines = (line.partition("=") for line in config.sweep.space)
    space = {name.strip(): parse(name.strip(), text.strip()) for name, _, text in lines}
    if not space:
        raise UserError("sweep.space is empty: choose sweep=lr_rank, or name settings and their ranges")
    if config.sweep.sampler == "grid":
        _combinations(space)  # refuses ranges before anything is written
    _refuse_unmeasured(config)
    folder = Path(config.run.root) / config.run.experiment / f"sweep-{config.sweep.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder):
        run = _Search(config, folder, space)
        try:
            code = run.go_through()
        except KeyboardInterrupt:
            code = Exit.PREEMPTED
        finally:
            run.leave()
    best = None
    if code is Exit.DONE and run.has_result:
        print(f"best {run.study.best_value:.5f} with {run.study.best_params}")
        best = folder.parent / trial_id(config, run.study.best_trial.number)
    return Outcome(code=code, folder=folder, best=best)


def _refuse_unmeasured(config: Config) -> None:
    """UserError when trials would have no held-out loss to compare."""
    if config.eval.interval == 0:
        raise UserError("a search compares held-out losses, but eval.interval=0: set the steps between measurements")
    if not index.load(from_config.data_folder(config)).split(index.HELDOUT):
        raise UserError(
            f"a search compares held-out losses, but nothing in {config.data.root} is held out: prepare with "
            "data.heldout_speakers above 0"
        )


@dataclass(kw_only=True)
class _Live:
    """A running trial. reported: the steps whose held-out losses the study already has."""

    number: int
    trial: optuna.trial.Trial
    running: Running
    folder: Path
    reported: set[int]
    pruned: bool = False


class _Search:
    """The study and its running trials, at most `sweep.parallel` of them."""

    def __init__(self, config: Config, folder: Path, space: Space) -> None:
        self._config, self._folder, self._space = config, folder, space
        self.study, self._trial_count = _study(config, folder, space)
        self._live: dict[int, _Live] = {}

    @property
    def has_result(self) -> bool:
        return any(t.state is TrialState.COMPLETE for t in self.study.trials)

    def go_through(self) -> Exit:
        """Runs all trials. Returns DONE, or PREEMPTED when a trial was stopped."""
        ended = Exit.DONE
        while True:
            while ended is Exit.DONE and len(self._live) < self._config.sweep.parallel and self._start_next():
                pass
            if not self._live:
                return ended
            time.sleep(_POLL_S)
            for slot, live in list(self._live.items()):
                code = live.running.code
                self._report(live)
                if code is not None:
                    del self._live[slot]
                    ended = _record_end(self.study, live, code) or ended
                    _publish(self._config, self.study, self._folder)

    def leave(self) -> None:
        """Stops the trials that must not outlive the search, and waits for them."""
        for live in self._live.values():
            live.running.stop()
        for live in self._live.values():
            live.running.wait()

    def _start_next(self) -> bool:
        """Starts an interrupted trial, otherwise a new one. Returns False when no trial is left."""
        number = _next(
            self._config, self.study, self._space, self._trial_count, {live.number for live in self._live.values()}
        )
        if number is None:
            return False
        trial = self.study.trials[number]
        try:
            settings = trial_config(self._config, number, trial.params)
        except ConfigError as error:
            # A combination that the rules refuse has no result. The other trials go on.
            print(f"trial {number} is left out: {error}", file=sys.stderr)
            self.study.tell(number, state=TrialState.FAIL)
            return True
        folder = from_config.run_dir(settings)
        slot = min(set(range(self._config.sweep.parallel)) - self._live.keys())
        running, job = trials.start(settings, slot, trial.user_attrs.get(_JOB))
        handle = optuna.trial.Trial(self.study, trial._trial_id)
        if job is not None:
            handle.set_user_attr(_JOB, job)
        where = f"{folder}" if job is None else f"{folder}, job {job}"
        print(f"trial {number} of {self._trial_count}: {trial.params} in {where}", file=sys.stderr)
        self._live[slot] = _Live(
            number=number, trial=handle, running=running, folder=folder, reported=set(trial.intermediate_values)
        )
        return True

    def _report(self, live: _Live) -> None:
        """Reports new held-out losses to the study, and cancels a trial that falls behind the median of the others."""
        for row in read_rows(live.folder / "metrics.jsonl"):
            if _METRIC in row and int(row["step"]) not in live.reported:
                live.reported.add(int(row["step"]))
                live.trial.report(row[_METRIC], int(row["step"]))
        may_prune = self._config.sweep.prune and not live.pruned and live.running.code is None
        if may_prune and live.reported and live.trial.should_prune():
            live.pruned = True
            live.running.give_up()


def parse(name: str, text: str) -> optuna.distributions.BaseDistribution:
    """`log(1e-5, 1e-3)`, `uniform(0, 0.1)`, `int(4, 64)` or `choice(8, 16, 32)`; UserError otherwise."""
    span, listed = _RANGE.fullmatch(text), _CHOICE.fullmatch(text)
    try:
        if span and span[1] == "int":
            return optuna.distributions.IntDistribution(int(span[2]), int(span[3]))
        if span:
            return optuna.distributions.FloatDistribution(float(span[2]), float(span[3]), log=span[1] == "log")
        if listed:
            options = [_plain(word) for word in top_level_values(listed[1])]
            return optuna.distributions.CategoricalDistribution(options)
    except ValueError as error:
        raise UserError(f"sweep.space.{name}: {text!r}: {error}") from error
    raise UserError(f"sweep.space.{name}: {text!r} is none of log(a, b), uniform(a, b), int(a, b), choice(a, b, ...)")


def _plain(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def _study(config: Config, folder: Path, space: Space) -> tuple[optuna.Study, int]:
    """Creates or reopens the study. Returns it with its total number of trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}", study_name=config.sweep.name, load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=config.sweep.warmup),
    )  # fmt: skip
    started = (t for t in study.trials if t.state is not TrialState.WAITING)
    if any(t.distributions != dict(space) for t in started):
        raise UserError(f"{folder} holds trials of another search space: set sweep.name to start a new search")
    if config.sweep.sampler != "grid":
        return study, config.sweep.trials
    combinations = _combinations(space)
    for values in combinations:
        study.enqueue_trial(values, skip_if_exists=True)
    return study, len(combinations)


def _combinations(space: Space) -> list[dict[str, Any]]:
    """All combinations of the choices; UserError when a setting has a range."""
    options: list[tuple[Any, ...]] = []
    for name, distribution in space.items():
        if not isinstance(distribution, optuna.distributions.CategoricalDistribution):
            raise UserError(
                f"sweep.space.{name}: sweep.sampler=grid tries every combination, of choice(a, b, ...) alone"
            )
        options.append(distribution.choices)
    return [dict(zip(space, values, strict=True)) for values in product(*options)]


def _next(
    config: Config, study: optuna.Study, space: Space, trial_count: int,
    live: set[int],
) -> int | None:  # fmt: skip
    """The number of an interrupted trial, otherwise of a new one, or None when no trial is left."""
    waiting = [t.number for t in study.trials if t.state is TrialState.RUNNING and t.number not in live]
    if waiting:
        return waiting[0]
    begun = sum(t.state is not TrialState.WAITING for t in study.trials)
    if begun >= trial_count:
        return None
    # Seeded by the trial's number: a sampler that is seeded once would propose the same values after a restart.
    seed = rng.key_seed(config.run.seed, "sweep", config.sweep.name, begun) % 2**32
    study.sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=min(4, trial_count), constant_liar=config.sweep.parallel > 1
    )
    return study.ask(dict(space)).number


def _record_end(study: optuna.Study, live: _Live, code: int) -> Exit | None:
    """Records in the study how a trial ended. Returns PREEMPTED when it was stopped, otherwise None."""
    values = [row[_METRIC] for row in read_rows(live.folder / "metrics.jsonl") if _METRIC in row]
    if live.pruned:
        study.tell(live.number, state=TrialState.PRUNED)
    elif code == Exit.DONE and values:
        study.tell(live.number, values[-1])
    elif code in _GIVEN_UP:
        study.tell(live.number, state=TrialState.FAIL)
    elif code == Exit.PREEMPTED:
        return Exit.PREEMPTED
    else:
        raise UserError(
            f"trial {live.number} ended with exit code {code}: fix that, then the same command continues it"
        )
    return None


def trial_config(config: Config, number: int, values: Mapping[str, Any]) -> Config:
    """The configuration of one trial: its values, and a run id that depends on its number alone. ConfigError when the
    rules refuse it."""
    # A choice may be a list or a mapping; optuna stores its text.
    parsed = {k: yaml.safe_load(v) if isinstance(v, str) and v[:1] in ("[", "{") else v for k, v in values.items()}
    return configuration.changed(config, {**parsed, "run.id": trial_id(config, number)})


def trial_id(config: Config, number: int) -> str:
    return f"{config.sweep.name}-{number:03d}"


def _publish(config: Config, study: optuna.Study, folder: Path) -> None:
    """Writes the report, and the best trial as an experiment file."""
    finished = [
        Trial(
            number=t.number,
            params=t.params,
            value=t.value,
            state=t.state.name.lower(),
            course=dict(t.intermediate_values),
            measured=_last_measured(folder.parent / trial_id(config, t.number)),
        )
        for t in study.trials
        if t.state.is_finished()
    ]
    sweep_report.write(folder / "report.html", f"{config.run.experiment}: {config.sweep.name}", finished)
    done = [t for t in finished if t.value is not None]
    if done:
        best = min(done, key=lambda t: t.value or 0.0)
        durable.write(folder / "best.yaml", best_experiment(config, best.number, best.params))


def _last_measured(folder: Path) -> Measured | None:
    measured = history.read(folder)
    return measured[-1] if measured else None


def best_experiment(config: Config, number: int, values: Mapping[str, Any]) -> str:
    """An experiment file with all settings of a trial except its run id, for --config-dir or conf/experiment."""
    settings = OmegaConf.to_container(OmegaConf.structured(trial_config(config, number, values)), enum_to_str=True)
    assert isinstance(settings, dict)
    del settings["run"]["id"]
    head = f"# @package _global_\n# Trial {number}, the best of sweep {config.sweep.name}: {dict(values)}\n"
    return f"{head}defaults:\n  - _self_\n{OmegaConf.to_yaml(OmegaConf.create(settings))}"
