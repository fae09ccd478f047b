"""`ltx-train fit`: train; the same command continues an interrupted run."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train.commands import measuring, planning, session, training
from ltx_train.commands.check import refuse_bad
from ltx_train.commands.training import Start
from ltx_train.config import Config
from ltx_train.contracts import Exit, UserError
from ltx_train.data.audit import audit
from ltx_train.evaluation import ranking, verdicts
from ltx_train.memory.plan import Planned
from ltx_train.training import checkpointing
from ltx_train.training.lock import FolderLock
from ltx_train.training.preemption import stop_before_training
from ltx_train.training.ranks import Ranks, found, joined
from ltx_train.training.tracking import read_rows
from ltx_train.training.watchdog import Watchdog


def run(config: Config) -> int:
    """DONE, or PREEMPTED after a signal and a save; on several devices in a process of each (`launch.command`)."""
    ranks = found(os.environ)
    if ranks.world > 1 and config.strategy.name == "single":
        raise UserError(
            f"{ranks.world} processes were started, but strategy=single: set strategy=ddp, zero1, zero2 or zero3"
        )
    stop_before_training()
    device = session.device(config, ranks.local)
    with joined(ranks, device, config.strategy.start_timeout_s or 86400):
        return _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> int:
    folder = session.run_dir(config)
    with ExitStack() as stack:
        ranks.lead(lambda: _entered(stack, FolderLock(folder)))
        config, planned, start = ranks.lead(lambda: _start(config, folder, ranks.world))
        complete = _complete(config, start)
        if complete:
            if ranks.leads:
                print(f"{folder} is complete: {complete}")
            return Exit.DONE
        limits = (config.strategy.start_timeout_s, config.strategy.step_timeout_s)
        watchdog = stack.enter_context(Watchdog(folder, ranks.rank, *limits))
        try:
            code = training.train(config, start, planned, ranks, watchdog)
        except torch.OutOfMemoryError as error:
            raise UserError(planning.out_of_memory(config, planned)) from error
    if ranks.leads and code is Exit.PREEMPTED:
        print("stopped after a save; the same command continues", file=sys.stderr)
    elif ranks.leads:
        _conclude(folder)
    return code


def _complete(config: Config, start: Start) -> str | None:
    """Why there is nothing left to train, if so."""
    if start.checkpoint is None:
        return None
    if start.step >= config.optim.steps:
        return f"{start.step} of {config.optim.steps} steps are done"
    ended = checkpointing.notes(start.checkpoint).get("ended")
    return f"step {start.step}, {ended}; eval.patience=0 would go on" if ended and config.eval.patience else None


def _conclude(folder: Path) -> None:
    """What the run's course says, and which of its checkpoints to take, printed and linked."""
    metrics = read_rows(folder / "metrics.jsonl")
    measured = [row for row in metrics if "val/loss" in row]
    for verdict in [*measuring.course(folder), *verdicts.of_metrics(measured[-1] if measured else {})]:
        print(verdict.text)
    entries = ranking.ranked(metrics, folder)
    if entries:
        print(ranking.table(entries))
        ranking.link(entries, folder)


def _entered(stack: ExitStack, lock: FolderLock) -> None:
    stack.enter_context(lock)


def _start(config: Config, folder: Path, world: int) -> tuple[Config, Planned | None, Start]:
    """Settles what the configuration leaves open; everything that can be refused is refused here, before
    weights are loaded."""
    root, index, stale = session.prepared(config)
    refuse_bad(audit(root, index, session.asked(config), stale), root)
    saved = folder / "config.yaml"
    found = checkpointing.committed(folder / "checkpoints") if config.run.resume == "auto" else []
    before = configuration.load(saved) if saved.is_file() and found else None
    config, planned = planning.settle(configuration.continued(config, before, configuration.readers(config, world)))
    configuration.rounds(config, world)
    if before is not None:
        for line in configuration.refuse_drift(before, config, folder):
            print(f"changed since the run was started: {line}")
        print(_resuming(folder, found[-1]))
    folder.mkdir(parents=True, exist_ok=True)
    saved.write_text(configuration.dump(config))
    return config, planned, Start(folder, root, index, found[-1] if found else None)


def _resuming(folder: Path, checkpoint: Path) -> str:
    """What is continued, and how many steps that had been logged are to be done again."""
    step = int(checkpoint.name.removeprefix("step-"))
    rows = read_rows(folder / "metrics.jsonl")
    lost = max(0, int(rows[-1]["step"]) - step) if rows else 0
    return f"resuming {folder} at step {step} from {checkpoint}, {lost} steps lost"
