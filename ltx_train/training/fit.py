"""Runs a task to its last step: what happens at the edge of every optimizer step, in which order.

Owns the Lightning Trainer and the order log -> evaluate -> save -> stop. Everything it calls is
given to it.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from ltx_train.contracts import DataError, Exit
from ltx_train.data.module import ShardData
from ltx_train.memory.recompute import BlockRunner
from ltx_train.model import adapter
from ltx_train.training.checkpointing import Checkpoint
from ltx_train.training.clock import Clock
from ltx_train.training.console import ConsoleProgress
from ltx_train.training.monitor import Monitor
from ltx_train.training.preemption import Preemption
from ltx_train.training.ranks import AgreedError, Ranks
from ltx_train.training.saving import Publish, Saver
from ltx_train.training.selection import Selection
from ltx_train.training.task import Task
from ltx_train.training.tracking import Metrics
from ltx_train.training.watchdog import Watchdog

Evaluate = Callable[[int], Mapping[str, float]]

# What training may wait for the save before without being told to save less often.
_WAIT_S, _WAIT_SHARE = 1.0, 0.05


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps; an interval of 0 means only at the end.

    failures: so many saves in a row may fail before the run ends. restarts: how often this machine has started it.
    dead_after: from this step on, adapter layers that have not moved are reported. sharded: checkpoints are.
    """

    folder: Path
    steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int
    failures: int
    restarts: int
    notes: Mapping[str, Any]
    dead_after: int = 20
    sharded: bool = False

    def logs(self, step: int) -> bool:
        """Whether a row of training numbers is written after this step."""
        return step % self.log_every == 0 or step >= self.steps


@dataclass(frozen=True)
class Outside:
    """What the loop reports to: the tracker and the console (rank 0 alone), measuring and publishing."""

    metrics: Metrics | None
    evaluate: Evaluate | None
    publish: Publish
    watchdog: Watchdog


class Edge(Callback):
    """The work at the edge of a step, the same on every rank; files are rank 0's."""

    def __init__(
        self, plan: Plan, monitor: Monitor, outside: Outside, preemption: Preemption, ranks: Ranks,
        selection: Selection, clock: Clock,
    ) -> None:  # fmt: skip
        self._plan, self._monitor, self._outside, self._selection = plan, monitor, outside, selection
        self._preemption, self._ranks, self._clock = preemption, ranks, clock
        self._saver = Saver(plan.folder / "checkpoints", plan.keep, outside.publish, leads=ranks.leads)
        self._progress: ConsoleProgress | None = None
        self._seen = self._saved = self._rowed = -1
        self._failed, self._blocked_s = 0, 0.0
        self._began = time.perf_counter()
        self._told_dead = self._told_wait = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = _task(pl_module)
        self._seen = self._saved = self._rowed = task.first_step
        if self._ranks.leads:
            self._progress = ConsoleProgress(self._plan.steps, task.first_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._monitor.data_arrived()
        self._clock.begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        task = _task(pl_module)
        self._clock.end(task.flops)
        for result in task.results:
            self._monitor.add(result)
        if task.step != self._seen:
            self._seen = task.step
            self._at_edge(trainer, task)
        self._monitor.batch_done()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _at_edge(self, trainer: Trainer, task: Task) -> None:
        step, last = task.step, task.step >= self._plan.steps
        # Measuring and saving may take longer than a step may.
        self._outside.watchdog.beat(patient=True)
        self._monitor.step_done()
        # Signals reach ranks one by one: all stop at the same edge, or none does.
        stop = self._ranks.any(self._preemption.requested)
        if self._progress is not None:
            self._progress.advance(step)
        row = self._training_row(task) if self._plan.logs(step) else {}
        better = False
        if self._outside.evaluate is not None and (_due(step, self._plan.evaluate_every) or last):
            measured = self._outside.evaluate(step)
            better = self._selection.saw(step, measured)
            row |= measured
        ended = self._selection.ended
        if step == task.first_step + 1 and self._plan.sharded:
            self._prepare(task)
        if row and self._outside.metrics is not None and self._progress is not None:
            self._outside.metrics.write(step, row)
            self._progress.row(step, self._plan.steps, row)
        if _due(step, self._plan.save_every) or last or stop or better or ended:
            self._save(task, must=bool(last or stop or ended))
        if stop:
            self._preemption.settled()
        trainer.should_stop = bool(stop or last or ended)
        self._outside.watchdog.beat()

    def _training_row(self, task: Task) -> dict[str, float]:
        assert task.grad_norm is not None
        row = self._monitor.row(self._ranks)
        row |= {"train/grad_norm": float(task.grad_norm), "optim/lr": task.schedule.at(task.step - 1)}
        row |= {f"train/grad_norm/{group}": float(norm) for group, norm in task.grad_norms.items()}
        row |= task.balance.row() | self._clock.row()
        if adapter.lora_parameters(task.transformer):
            row |= self._adapter_row(task)
        runner = task.transformer.run_block
        if isinstance(runner, BlockRunner) and runner.stream is not None:
            row["perf/stream_stall_s"] = runner.stream.stall_seconds() / max(1, task.step - self._rowed)
        if task.guard.skipped:
            row["run/skipped_steps"] = task.guard.skipped
        if self._plan.restarts:
            row["run/restarts"] = self._plan.restarts
        if self._failed:
            row["run/failed_saves"] = self._failed
        if self._blocked_s:
            row["perf/save_blocked_s"] = self._blocked_s
        self._rowed = task.step
        return {name: value for name, value in row.items() if math.isfinite(value)}

    def _adapter_row(self, task: Task) -> dict[str, float]:
        """How far the adapter has moved, and which of its layers never did."""
        ratios = adapter.norm_ratios(task.transformer)
        row = {f"train/adapter_norm_ratio/{group}".rstrip("/"): ratio for group, ratio in ratios.items()}
        if task.step < self._plan.dead_after:
            return row
        dead = adapter.unmoved(task.transformer)
        if dead and not self._told_dead and self._ranks.leads:
            print(f"ltx-train: {len(dead)} adapter layers have not moved since the start: {dead[0]}", file=sys.stderr)
        self._told_dead = True
        return {**row, "train/dead_adapters": len(dead)}

    def _prepare(self, task: Task) -> None:
        """Once the optimizer has its moments."""
        shard = task.updates.held().shard
        assert shard is not None
        self._saver.prepare(shard)

    def _save(self, task: Task, *, must: bool) -> None:
        """Starts to save the step; one that `must` succeed is waited for."""
        if task.step == self._saved:
            return
        task.guard.check()
        began = time.perf_counter()
        self._settle(must=False)
        if 0 < self._plan.save_every <= task.step - self._saved:
            self._tell_wait(time.perf_counter() - began, began - self._began)
        self._began = began
        notes = {
            **self._plan.notes, "monitor": self._monitor.state(self._ranks), "balance": task.balance.state(),
            "spikes": None if task.spikes is None else task.spikes.state(),
            "selection": self._selection.state(), "ended": self._selection.ended, "clock": self._clock.state(),
        }  # fmt: skip
        held = task.updates.held()
        average = task.average.tensors if task.average is not None else {}
        live = Checkpoint(task.step, held.weights, held.optimizer, notes, average, held.shard)
        if held.shard is not None:
            live = replace(live, name=self._ranks.lead(lambda: live.name))
        if self._ranks.leads or held.shard is not None:
            self._saver.start(live, self._selection.best_step)
        self._saved = task.step
        self._blocked_s = time.perf_counter() - began
        if must:
            self._settle(must=True)

    def _tell_wait(self, waited: float, since: float) -> None:
        """Once, when a save took longer than training to the next: seconds waited for it, after so many."""
        if waited < max(_WAIT_S, _WAIT_SHARE * since) or self._told_wait or not self._ranks.leads:
            return
        self._told_wait = True
        print(
            f"ltx-train: training waited {waited:.0f} s for the save before, which took longer than the "
            f"{since:.0f} s between them: raise checkpoint.interval ({self._plan.save_every}) or use a faster disk",
            file=sys.stderr,
        )

    def _settle(self, *, must: bool) -> None:
        """The outcome of the save in flight, on every rank; a failure is reported and the run goes on, unless it
        was one too many in a row."""
        if self._saved < 0:
            return
        try:
            if not self._ranks.leads:
                self._saver.settle()  # of its own part, whose failure the leading rank tells
            self._ranks.lead(self._saver.settle)
        except (DataError, AgreedError) as error:
            self._failed += 1
            if must or self._failed >= self._plan.failures:
                raise
            if str(error):
                print(f"ltx-train: {error}; training goes on ({self._failed} in a row)", file=sys.stderr)
            return
        self._failed = 0

    def _close(self) -> None:
        self._saver.close()
        if self._progress is not None:
            self._progress.close()


def fit(
    plan: Plan, task: Task, data: ShardData, monitor: Monitor, device: torch.device, outside: Outside, ranks: Ranks,
    selection: Selection, clock: Clock,
) -> Exit:  # fmt: skip
    """Trains from the task's first step to the plan's last, or until measuring says so; DONE, or PREEMPTED after a
    signal and a save."""
    preemption = Preemption()
    edge = Edge(plan, monitor, outside, preemption, ranks, selection, clock)
    _quiet()
    # One device per process and our own collectives: Lightning must not look for other processes by itself.
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=[device.index] if device.type == "cuda" else 1,
        strategy="auto", plugins=[LightningEnvironment()], max_epochs=1, callbacks=[preemption, edge], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False, default_root_dir=plan.folder,
    )  # fmt: skip
    preemption.install()
    try:
        trainer.fit(task, datamodule=data)
    finally:
        preemption.leave()
        if outside.metrics is not None:
            outside.metrics.close()
    if task.step < plan.steps and selection.ended and ranks.leads:
        print(f"ended at step {task.step}: {selection.ended}")
    return Exit.PREEMPTED if task.step < plan.steps and not selection.ended else Exit.DONE


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _task(module: LightningModule) -> Task:
    assert isinstance(module, Task)
    return module


def _quiet() -> None:
    """Lightning's hints about workers and devices are not news to a user of this command."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
