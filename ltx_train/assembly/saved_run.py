"""A run's folder, opened: its own configuration and one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from ltx_train import config as configuration
from ltx_train.config import Config
from ltx_train.contracts import DataError
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import Checkpoint


def open_run(folder: Path, step: int | None) -> tuple[Config, Checkpoint]:
    """step: the checkpoint's, the newest by default. DataError lists the steps that are there."""
    checkpoints = commit.committed(folder / "checkpoints")
    if not checkpoints:
        raise DataError(f"no checkpoint in {folder}: run `ltx-train fit` first, or set export.run to a run folder")
    path = checkpoints[-1] if step is None else folder / "checkpoints" / f"step-{step:06d}"
    if path not in checkpoints:
        listed = ", ".join(str(int(p.name.removeprefix("step-"))) for p in checkpoints)
        raise DataError(f"{folder} has no checkpoint of step {step}; there are: {listed}")
    return settings_of(folder, path), commit.load(path)


def settings_of(folder: Path, checkpoint: Path) -> Config:
    """The settings that a checkpoint was made with, which its manifest covers; those of the run's folder for a
    checkpoint of 0.1.0 or 0.2.0, which holds none. DataError when there are neither."""
    text = commit.settings(checkpoint)
    if text:
        return configuration.parse(text, checkpoint / commit.SETTINGS)
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} has checkpoints but no config.yaml, which holds their settings: put it back")
    return configuration.load(folder / "config.yaml")
