"""Where numbers go: metrics.jsonl always, W&B when asked for, a line or a progress bar on the console.

Owns metric files and their continuation after an interruption. Knows names and numbers, not how
they are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Values = Mapping[str, float]


class Metrics:
    """Writes rows of named numbers per optimizer step."""

    def __init__(self, folder: Path, first_step: int, wandb_mode: str, project: str, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        _drop_later_rows(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = None if wandb_mode == "disabled" else _start_wandb(folder, wandb_mode, project, config)

    def write(self, step: int, values: Values) -> None:
        """One row; the file is flushed, so that a killed run keeps it."""
        row = {"step": step, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({"trainer/global_step": step, **values}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


class ConsoleProgress:
    """A Rich bar on a terminal, one plain line per interval elsewhere."""

    def __init__(self, total: int, first_step: int) -> None:
        self._bar = self._task = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("fit"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("fit", total=total, completed=first_step, loss="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def row(self, step: int, total: int, values: Values) -> None:
        shown = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items() if k in _SHOWN)
        if self._bar is not None and self._task is not None:
            if "train/loss" in values:
                self._bar.update(self._task, loss=f"loss {values['train/loss']:.4g}")
            if any(name.startswith("val/") for name in values):
                self._bar.console.print(f"step {step}/{total}  {shown}", highlight=False)
        else:
            print(f"step {step}/{total}  {shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


_SHOWN = (
    "train/loss", "train/loss_video", "train/loss_audio", "train/grad_norm", "optim/lr", "perf/step_s",
    "val/loss", "val/reference_gap", "val/adapter_gain",
)  # fmt: skip


def read_rows(path: Path) -> list[dict[str, float]]:
    """All rows of a metrics file; a last line cut by a crash is ignored."""
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _drop_later_rows(path: Path, step: int) -> None:
    """Removes rows of steps that will be done again, so that a continued curve has each step once."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= step]
    if path.is_file():
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)


def _start_wandb(folder: Path, mode: str, project: str, config: Mapping[str, Any]) -> Any:
    import wandb

    # An id that depends on the run's folder alone continues the same W&B run after a restart.
    run_id = hashlib.sha256("/".join(folder.parts[-2:]).encode()).hexdigest()[:12]
    settings = wandb.Settings(init_timeout=10, silent=True, console="off")
    try:
        return wandb.init(
            project=project, id=run_id, resume="allow", dir=folder, mode=mode, settings=settings,  # pyright: ignore[reportArgumentType]
            name="/".join(folder.parts[-2:]), config=dict(config),
        )  # fmt: skip
    except (wandb.Error, OSError) as error:
        print(
            f"ltx-train: W&B is not reachable ({error}); recording offline, `wandb sync {folder}/wandb`",
            file=sys.stderr,
        )
        return wandb.init(
            project=project, id=run_id, dir=folder, mode="offline", settings=settings, config=dict(config)
        )
