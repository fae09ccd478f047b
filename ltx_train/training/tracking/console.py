"""Prints the progress of a run: a progress bar on a terminal, one line per logged row elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ltx_train.training.tracking.sinks import Values


class ConsoleProgress:
    """A Rich progress bar on a terminal, above it and elsewhere one line per logged row."""

    def __init__(self, total: int, first_step: int) -> None:
        self._bar = self._task = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("fit"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                _Left(),
                TextColumn("{task.fields[loss]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("fit", total=total, completed=first_step, loss="", rate="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def row(self, step: int, total: int, values: Values) -> None:
        shown = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items() if k in _SHOWN)
        if self._bar is not None and self._task is not None:
            if "train/loss" in values:
                self._bar.update(self._task, loss=f"loss {values['train/loss']:.4g}")
            if "perf/step_s" in values:
                self._bar.update(self._task, rate=f"{values['perf/step_s']:.3g} s/step")
            self._bar.console.print(f"step {step}/{total}  {shown}", highlight=False)
        else:
            print(f"step {step}/{total}  {shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Left(TimeRemainingColumn):
    """The remaining time, named so."""

    def render(self, task: Task) -> Text:
        return super().render(task) + Text(" left")


_SHOWN = (
    "train/loss", "train/loss_video", "train/loss_audio", "train/grad_norm", "optim/lr", "perf/step_s",
    "val/loss", "val/gained_gap", "val/adapter_gain",
)  # fmt: skip
