"""`ltx-train fit`: train; the same command continues an interrupted run."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train import durable, terminal
from ltx_train.assembly import from_config, heldout_measurement, memory_plan, publishing, resolve, run_builder
from ltx_train.assembly.checked_data import open_checked
from ltx_train.assembly.closing import close
from ltx_train.assembly.run_builder import RunStart
from ltx_train.assembly.saved_run import settings_of
from ltx_train.assembly.setup import setup
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, DataError, Exit, UserError
from ltx_train.distributed.ranks import Ranks, process_group, ranks_from_environment
from ltx_train.evaluation import ranking, verdicts
from ltx_train.jobs.folder_lock import FolderLock
from ltx_train.memory.planning.search import MemoryPlan
from ltx_train.training.checkpoints import commit
from ltx_train.training.tracking.metrics import read_rows
from ltx_train.training.watchdog import Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """The decisions of rank 0 for all ranks. finished: why there is nothing left to train, None otherwise."""

    config: Config
    plan: MemoryPlan | None
    start: RunStart
    finished: str | None


def run(config: Config) -> int:
    """Returns DONE, or PREEMPTED after a signal and a save. Each of several devices has its own process
    (`jobs.processes`)."""
    ranks = ranks_from_environment(os.environ)
    if not ranks.leads:
        terminal.silence()
    resolve.sharing(config, ranks)
    launch = resolve.launch(config)
    with process_group(ranks, resolve.device(config, ranks), launch.rendezvous_timeout_s):
        return _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> int:
    folder = from_config.run_dir(config)
    with ExitStack() as stack:
        # `lead` broadcasts the result of its function. A lock cannot be sent, so `_enter` returns nothing.
        ranks.lead(lambda: _enter(stack, FolderLock(folder)))
        decided = ranks.lead(lambda: _settle(config, folder, ranks.world))
        if decided.finished is not None:
            if ranks.leads:
                print(f"{folder} is complete: {decided.finished}")
                close(None, f"ltx-train evaluate {folder}")
            return Exit.DONE
        launch = resolve.launch(decided.config)
        watchdog = stack.enter_context(
            Watchdog(folder, ranks.rank, start_s=launch.start_timeout_s, step_s=launch.step_timeout_s)
        )
        try:
            code = run_builder.train(setup(decided.config, ranks, decided.plan), decided.start, watchdog)
        except torch.OutOfMemoryError as error:
            raise UserError(memory_plan.out_of_memory(decided.config, decided.plan)) from error
    if ranks.leads and code is Exit.PREEMPTED:
        print(f"stopped after a save; the same command continues, or: ltx-train fit {folder}", file=sys.stderr)
    elif ranks.leads:
        _conclude(folder)
    return code


def _enter(stack: ExitStack, lock: FolderLock) -> None:
    stack.enter_context(lock)


def _settle(config: Config, folder: Path, world: int) -> _Settled:
    """Decides all settings that the configuration leaves open. Every check that can refuse a run happens here, before
    weights are loaded."""
    config = configuration.written_out(config)
    root, index = open_checked(config)
    checkpoints = _usable_checkpoints(folder / "checkpoints")
    if checkpoints and config.run.resume == "never":
        raise ConfigError(
            f"run.resume=never, but {folder} holds checkpoints: choose another run.id, or remove that folder"
        )
    before = settings_of(folder, checkpoints[-1]) if checkpoints else None
    readers = configuration.readers(config, world)
    machines = resolve.machines(config, world)
    config, plan = memory_plan.settle(configuration.continued(config, before, readers), machines=machines)
    configuration.micro_batches(config, world)
    if before is not None:
        for line in configuration.refuse_drift(before, config, folder):
            print(f"changed since the run was started: {line}")
        print(_resume_message(folder, checkpoints[-1]))
    folder.mkdir(parents=True, exist_ok=True)
    durable.write(folder / "config.yaml", configuration.dump(config))
    start = RunStart(folder=folder, root=root, index=index, checkpoint=checkpoints[-1] if checkpoints else None)
    return _Settled(config=config, plan=plan, start=start, finished=_finished(config, start))


def _usable_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, after the remains of killed saves were removed.

    DataError when all are damaged: starting over in their place needs the user's consent.
    """
    commit.remove_halves(folder)
    usable, damaged = commit.committed(folder), commit.damaged(folder)
    for path in damaged:
        print(f"ltx-train: {path} is not a complete checkpoint: passed over", file=sys.stderr)
    if damaged and not usable:
        raise DataError(
            f"every checkpoint in {folder} is damaged: copy good ones there, or remove them to start over at step 0"
        )
    return usable


def _finished(config: Config, start: RunStart) -> str | None:
    """Why there is nothing left to train, None otherwise."""
    if start.checkpoint is None:
        return None
    if start.step >= config.optim.steps:
        return f"{start.step} of {config.optim.steps} steps are done"
    ended = commit.notes(start.checkpoint).get("ended")
    return f"step {start.step}, {ended}; eval.patience=0 continues it" if ended and config.eval.patience else None


def _resume_message(folder: Path, checkpoint: Path) -> str:
    """Names the checkpoint that is continued and the number of logged steps that are repeated."""
    step = commit.step_of(checkpoint)
    rows = read_rows(folder / "metrics.jsonl")
    lost = max(0, int(rows[-1]["step"]) - step) if rows else 0
    return f"resuming {folder} at step {step} from {checkpoint}, {lost} steps lost"


def _conclude(folder: Path) -> None:
    """Prints the verdicts on the run's metrics and its ranked checkpoints, and links the best one."""
    metrics = read_rows(folder / "metrics.jsonl")
    measured = [row for row in metrics if "val/loss" in row]
    for verdict in [*heldout_measurement.course(folder), *verdicts.of_metrics(measured[-1] if measured else {})]:
        print(verdict.text)
    found = ranking.ranked(metrics, folder)
    best = None
    if found.entries:
        print(ranking.table(found))
        best = ranking.link(found, folder)
    recorded = sorted(folder.glob("wandb/offline-run-*"))
    if recorded:
        print(f"W&B has recorded offline; to upload: wandb sync {' '.join(str(path) for path in recorded)}")
    result = best or publishing.newest_adapter(folder) or commit.committed(folder / "checkpoints")[-1]
    close(result, f"ltx-train {'evaluate' if measured else 'export'} {folder}")
