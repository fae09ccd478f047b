"""Prints the progress of a run: a line of the display on a terminal, one line per logged row above it and elsewhere."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from ltx_train import terminal
from ltx_train.training.tracking.sinks import Values


class ConsoleProgress:
    """Shows the steps of a run until it is closed."""

    def __init__(self, total: int, first_step: int) -> None:
        self._open = ExitStack()
        self._display = self._open.enter_context(terminal.shown())
        self._task = None if self._display is None else self._display.add("fit", total, first_step)

    def advance(self, step: int) -> None:
        if self._display is not None and self._task is not None:
            self._display.bars.update(self._task, completed=step)

    def row(self, step: int, total: int, values: Values) -> None:
        shown = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items() if k in _SHOWN)
        if self._display is None or self._task is None:
            print(f"step {step}/{total}  {shown}", file=sys.stderr, flush=True)
            return
        if "train/loss" in values:
            self._display.bars.update(self._task, note=f"loss {values['train/loss']:.4g}")
        if "perf/step_s" in values:
            self._display.bars.update(self._task, rate=f"{values['perf/step_s']:.3g} s/step")
        self._display.bars.console.print(f"step {step}/{total}  {shown}", highlight=False)

    def close(self) -> None:
        self._open.close()


_SHOWN = (
    "train/loss", "train/loss_video", "train/loss_audio", "train/grad_norm", "optim/lr", "perf/step_s",
    "val/loss", "val/gained_gap", "val/adapter_gain",
)  # fmt: skip
