"""Runs a task to its last step: what happens at the edge of every optimizer step, in which order.

Owns the Lightning Trainer and the order log -> evaluate -> save -> stop. Everything it calls is
given to it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ltx_train.contracts import Exit
from ltx_train.data.module import ShardData
from ltx_train.memory.recompute import BlockRunner
from ltx_train.model import adapter
from ltx_train.training import checkpointing
from ltx_train.training.monitor import Monitor
from ltx_train.training.preemption import Preemption
from ltx_train.training.task import Task
from ltx_train.training.tracking import ConsoleProgress, Metrics

Evaluate = Callable[[int], Mapping[str, float]]
Publish = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps; an interval of 0 means only at the end."""

    folder: Path
    steps: int
    accumulate: int
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int
    notes: Mapping[str, Any]


class Edge(Callback):
    """The work at the edge of a step."""

    def __init__(
        self, plan: Plan, monitor: Monitor, metrics: Metrics, evaluate: Evaluate | None, publish: Publish,
        preemption: Preemption,
    ) -> None:  # fmt: skip
        self._plan, self._monitor, self._metrics = plan, monitor, metrics
        self._evaluate, self._publish, self._preemption = evaluate, publish, preemption
        self._progress: ConsoleProgress | None = None
        self._seen = self._saved = self._rowed = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = _task(pl_module)
        self._seen = self._saved = self._rowed = task.first_step
        self._progress = ConsoleProgress(self._plan.steps, task.first_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._monitor.data_arrived()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        task = _task(pl_module)
        assert task.result is not None
        self._monitor.add(task.result)
        if task.step != self._seen:
            self._seen = task.step
            self._at_edge(trainer, task)
        self._monitor.batch_done()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._progress.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._progress is not None:
            self._progress.close()

    def _at_edge(self, trainer: Trainer, task: Task) -> None:
        step, last = task.step, task.step >= self._plan.steps
        assert self._progress is not None
        self._monitor.step_done()
        self._progress.advance(step)
        row = self._training_row(task) if step % self._plan.log_every == 0 or last else {}
        if self._evaluate is not None and (_due(step, self._plan.evaluate_every) or last):
            row |= self._evaluate(step)
        if row:
            self._metrics.write(step, row)
            self._progress.row(step, self._plan.steps, row)
        if _due(step, self._plan.save_every) or last or self._preemption.requested:
            self._save(task)
        trainer.should_stop = self._preemption.requested or last

    def _training_row(self, task: Task) -> dict[str, float]:
        assert task.grad_norm is not None
        row = self._monitor.row()
        row |= {"train/grad_norm": float(task.grad_norm), "optim/lr": task.schedule.at(task.step - 1)}
        if adapter.lora_parameters(task.transformer):
            row["train/adapter_norm_ratio"] = adapter.norm_ratio(task.transformer)
        runner = task.transformer.run_block
        if isinstance(runner, BlockRunner) and runner.stream is not None:
            row["perf/stream_stall_s"] = runner.stream.stall_seconds() / max(1, task.step - self._rowed)
        self._rowed = task.step
        return row

    def _save(self, task: Task) -> None:
        if task.step == self._saved:
            return
        task.refuse_nonfinite()
        optimizer: Any = task.optimizers(use_pl_optimizer=False)
        notes = {**self._plan.notes, "monitor": self._monitor.state()}
        weights = {name: p.detach() for name, p in adapter.trainable_parameters(task.transformer).items()}
        saved = checkpointing.Checkpoint(task.step, weights, optimizer.state_dict(), notes)
        checkpointing.save(self._plan.folder / "checkpoints", saved, self._plan.keep)
        self._publish(task.step)
        self._saved = task.step


def fit(
    plan: Plan, task: Task, data: ShardData, monitor: Monitor, metrics: Metrics, device: torch.device,
    evaluate: Evaluate | None, publish: Publish,
) -> Exit:  # fmt: skip
    """Trains from the task's first step to the plan's last; DONE, or PREEMPTED after a signal and a save."""
    preemption = Preemption()
    edge = Edge(plan, monitor, metrics, evaluate, publish, preemption)
    _quiet()
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1,
        max_steps=plan.steps - task.first_step, accumulate_grad_batches=plan.accumulate,
        callbacks=[preemption, edge], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False,
        default_root_dir=plan.folder,
    )  # fmt: skip
    try:
        trainer.fit(task, datamodule=data)
    finally:
        metrics.close()
    return Exit.PREEMPTED if preemption.requested and task.step < plan.steps else Exit.DONE


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _task(module: LightningModule) -> Task:
    assert isinstance(module, Task)
    return module


def _quiet() -> None:
    """Lightning's hints about workers and devices are not news to a user of this command."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
