"""Creates the trackers of a configuration."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ltx_train.config import Config
from ltx_train.training.tracking.sinks import Csv, Sink, TensorBoard, WandB

_LIBRARIES = ("ltx-train", "torch", "diffusers", "peft", "lightning", "optimum-quanto", "bitsandbytes")


def sinks(config: Config, folder: Path, first_step: int) -> list[Sink]:
    """Creates all configured trackers, W&B first: it may refuse the API key."""
    trackers: list[Sink] = []
    if config.logger.wandb != "disabled":
        facts = {**asdict(config), "system": _system()}
        trackers.append(WandB(folder, config.logger.wandb, config.logger.project, facts, first_step))
    if "csv" in config.logger.also:
        trackers.append(Csv(folder))
    if "tensorboard" in config.logger.also:
        trackers.append(TensorBoard(folder, first_step))
    return trackers


def _system() -> dict[str, Any]:
    """Library versions and devices, on which results depend beside the configuration."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: _version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), "cuda": torch.version.cuda, "devices": devices, **versions}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # a checkout that is run without being installed
        return "not installed"
