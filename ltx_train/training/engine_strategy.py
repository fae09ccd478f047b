"""Lightning's DeepSpeedStrategy around an engine that exists already.

The engine is made before the Trainer, so that a checkpoint is restored before training and `bench` measures the same
engine. The process group is this project's own. What is left to Lightning is the loop around the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy


class EngineStrategy(DeepSpeedStrategy):
    """engine: DeepSpeed's, around the transformer. The task calls it; the Trainer never wraps the task into another."""

    def __init__(self, engine: Any) -> None:
        super().__init__(config={"zero_optimization": {"stage": engine.zero_optimization_stage()}})
        self._made = engine

    @property
    def deepspeed_engine(self) -> Any:
        return self._made

    @property
    def root_device(self) -> torch.device:
        """The Trainer of each process has one device, whatever the number of processes on this machine."""
        assert self.parallel_devices
        return self.parallel_devices[0]

    def setup_environment(self) -> None:
        """Lightning's own refuses CPUs, on which the tests run."""
        Strategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """The ranks have met before."""

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.optimizers = [self._made.optimizer.optimizer]
        self.setup_precision_plugin()

    def barrier(self, *_: Any, **__: Any) -> None:
        """The ranks agree after every step."""

    def teardown(self) -> None:
        """The process group outlives the Trainer."""


class AsGiven(DeepSpeedPrecision):
    """Batches stay as they are. Lightning's own would round noise levels, and cannot copy frozen dataclasses."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_module(self, module: Any) -> Any:
        return module
