"""The training loop: runs a task to its last step and does the work between two optimizer steps.

Owns the Lightning Trainer and the order log -> evaluate -> save -> page -> stop. The callers pass in all parts.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from ltx_train.contracts import Exit
from ltx_train.data.module import ShardData
from ltx_train.distributed.ranks import Ranks
from ltx_train.training.cadence import Cadence
from ltx_train.training.debugging import StepProfiler
from ltx_train.training.engine_strategy import AsGiven, EngineStrategy
from ltx_train.training.logged_row import TrainingRows
from ltx_train.training.one_device import OneDevice
from ltx_train.training.preemption import Preemption
from ltx_train.training.saving import CheckpointWriter
from ltx_train.training.state import RunState
from ltx_train.training.step import Task
from ltx_train.training.tracking.console import ConsoleProgress
from ltx_train.training.tracking.metrics import Metrics
from ltx_train.training.watchdog import Watchdog

# Seconds between two pages, as a multiple of those that the last one took.
_PAGE_EVERY = 20.0
Evaluate = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """The services that the loop calls.

    metrics, page: set on rank 0 only. page: writes the page of the run. generate: makes clips. profiler: records the
    first steps. restarts: starts by `supervise` before this one. prepares_saves: whether the loop allocates host memory
    for saves after the first step (sliced states).
    """

    metrics: Metrics | None
    page: Callable[[], Path] | None
    evaluate: Evaluate | None
    generate: Evaluate | None
    writer: CheckpointWriter
    watchdog: Watchdog
    profiler: StepProfiler | None
    restarts: int
    prepares_saves: bool


class Edge(Callback):
    """The work between two optimizer steps. Every rank runs it; only rank 0 writes and prints."""

    def __init__(
        self, cadence: Cadence, state: RunState, rows: TrainingRows, outside: Outside, *, preemption: Preemption,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self._cadence, self._state, self._rows, self._outside = cadence, state, rows, outside
        self._preemption, self._ranks = preemption, ranks
        self._progress: ConsoleProgress | None = None
        self._last_step = state.step.first_step
        self._page_due = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outside.writer.begin(self._last_step)
        self._state.monitor.begin()
        if self._ranks.leads:
            self._progress = ConsoleProgress(self._cadence.steps, self._last_step)
        if self._last_step == 0:
            self._outside.watchdog.beat(patient=True)
            with self._state.monitor.paused():
                if self._generate(0):
                    self._write_page()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._state.monitor.data_arrived()
        self._state.clock.begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        step, monitor = self._state.step, self._state.monitor
        self._state.clock.end(step.flops)
        for result in step.results:
            monitor.add(result)
        if step.step != self._last_step:
            self._last_step = step.step
            trainer.should_stop = self._at_edge(step.step)
        monitor.batch_done()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _at_edge(self, step: int) -> bool:
        """Logs, evaluates, saves and writes the page, in this order. Returns whether training ends here."""
        cadence, writer = self._cadence, self._outside.writer
        # Measuring and saving have a longer time limit than a step.
        self._outside.watchdog.beat(patient=True)
        if self._progress is not None:
            self._progress.advance(step)
        self._state.monitor.step_done()
        # A signal reaches the ranks at different times. The agreement makes all of them stop after the same step.
        stop = self._ranks.any(self._preemption.requested)
        row = self._training_row() if cadence.logs(step) else {}
        with self._state.monitor.paused():
            heldout = self._evaluate(step)
            row |= self._generate(step)
        better = self._state.early_stop.record(step, heldout)
        ended = self._state.early_stop.reason is not None
        if step == self._state.step.first_step + 1 and self._outside.prepares_saves:
            writer.prepare(self._state)
        self._report(step, {**row, **heldout})
        final = cadence.is_last(step) or stop or ended
        if cadence.saves(step) or better or final:
            writer.save(self._state, must=final, may_wait=self._may_wait)
        if stop:
            self._preemption.saved()
        elif final or heldout or cadence.generates(step):
            # Behind the save: a page must not keep a save waiting, and a machine that is taken away has no time for it.
            with self._state.monitor.paused():
                self._write_page(must=final)
        if self._outside.profiler is not None:
            self._outside.profiler.step()
        # After the last step, the trackers may take long to send what they hold.
        self._outside.watchdog.beat(patient=final)
        return final

    def _may_wait(self) -> bool:
        """Whether a failed save is tried again: not after a signal."""
        self._outside.watchdog.beat(patient=True)
        return not self._ranks.any(self._preemption.requested)

    def _training_row(self) -> dict[str, float]:
        row, writer = self._rows.row(), self._outside.writer
        counts = {
            "run/restarts": self._outside.restarts, "run/failed_saves": writer.failed,
            "perf/save_blocked_s": writer.blocked_s,
        }  # fmt: skip
        return row | {name: value for name, value in counts.items() if value}

    def _evaluate(self, step: int) -> Mapping[str, float]:
        if self._outside.evaluate is None or not self._cadence.measures(step):
            return {}
        return self._outside.evaluate(step)

    def _generate(self, step: int) -> Mapping[str, float]:
        if self._outside.generate is None or not self._cadence.generates(step):
            return {}
        return self._outside.generate(step)

    def _report(self, step: int, row: Mapping[str, float]) -> None:
        if row and self._outside.metrics is not None and self._progress is not None:
            self._outside.metrics.write(step, row)
            self._progress.row(step, self._cadence.steps, row)

    def _write_page(self, *, must: bool = False) -> None:
        """The page is for people who look in: it takes at most a twentieth of the time, and no run ends because it
        cannot be written."""
        started = time.monotonic()
        if self._outside.page is None or (started < self._page_due and not must):
            return
        try:
            self._outside.page()
        except Exception as error:
            print(f"ltx-train: no page: {type(error).__name__}: {error}; the run goes on", file=sys.stderr)
        ended = time.monotonic()
        self._page_due = ended + _PAGE_EVERY * (ended - started)

    def _close(self) -> None:
        self._outside.writer.close()
        if self._progress is not None:
            self._progress.close()


def run_to_end(
    task: Task, data: ShardData, state: RunState, cadence: Cadence, outside: Outside, *, folder: Path, ranks: Ranks,
    engine: Any = None,
) -> Exit:  # fmt: skip
    """Trains to the last step or until early stopping. Returns DONE, or PREEMPTED after a signal and a save.

    engine: DeepSpeed's, where it updates the weights.
    """
    device: torch.device = state.step.recipe.device
    preemption = Preemption()
    rows = TrainingRows(state, task.transformer, cadence, ranks)
    edge = Edge(cadence, state, rows, outside, preemption=preemption, ranks=ranks)
    _silence_lightning()
    # One process per device with this project's collectives: Lightning must not search for other processes.
    plugins: list[Any] = [LightningEnvironment(), *([] if engine is None else [AsGiven()])]
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=[device.index] if device.type == "cuda" else 1,
        strategy=OneDevice(device) if engine is None else EngineStrategy(engine), plugins=plugins, max_epochs=1,
        callbacks=[preemption, edge], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False,
        default_root_dir=folder,
    )  # fmt: skip
    preemption.install()
    try:
        trainer.fit(task, datamodule=data)
    except SystemExit as ended:
        if preemption.forced:
            raise KeyboardInterrupt from ended  # Lightning turns it into exit code 1
        raise
    finally:
        preemption.leave()
        if outside.metrics is not None:
            outside.metrics.close()
    reason = state.early_stop.reason
    is_complete = cadence.is_last(state.step.step)
    if not is_complete and reason and ranks.leads:
        print(f"ended at step {state.step.step}: {reason}")
    return Exit.DONE if is_complete or reason else Exit.PREEMPTED


def _silence_lightning() -> None:
    """Silences Lightning's hints about workers and devices, which a user of this command cannot act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
