"""The Lightning module: one training step, and nothing about files, signals or reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import Batch, DivergedError, Mode, StepResult
from ltx_train.diffusion import conditions, objective
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.training.optim import Schedule


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: mode, noise levels, weights of the modalities, and the seed of all draws."""

    mode: Mode
    sigma: SigmaDistribution
    video_weight: float
    audio_weight: float
    seed: int


class OnHost:
    """A scalar on its way to the host: reading it waits for its own step, not for what was queued since."""

    def __init__(self, scalar: Tensor) -> None:
        self._value, self._arrived = scalar.detach(), None
        if scalar.is_cuda:
            self._value = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._value.copy_(scalar.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


class Task(LightningModule):
    """Trains whatever parameters of the transformer require gradients, from optimizer step `first_step` on."""

    def __init__(
        self,
        transformer: Transformer,
        goal: Objective,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer,
        clip: float,
        first_step: int,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.goal, self.schedule, self.clip, self.first_step = goal, schedule, clip, first_step
        self._optimizer = optimizer
        self._dropout = adapter.DropoutKeys(transformer)
        self.parameters_in_training = list(adapter.trainable_parameters(transformer).values())
        self.result: StepResult | None = None
        self.grad_norm: Tensor | None = None
        self._keys: tuple[str, ...] = ()
        self._unchecked: list[tuple[int, tuple[str, ...], OnHost]] = []

    @property
    def step(self) -> int:
        """Optimizer steps done in this run's whole life."""
        return self.first_step + self.trainer.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.refuse_nonfinite(pending=1)
        self._keys = batch.keys
        pairs = zip(batch.keys, batch.draws, strict=True)
        self._dropout.set([rng.key_seed(self.goal.seed, "dropout", key, draw) for key, draw in pairs])
        draws = conditions.draw(batch, self.goal.mode, self.goal.sigma, self.goal.seed)
        inputs = conditions.to_device(conditions.assemble(batch, self.goal.mode, draws), self.device)
        self.result = objective.losses(self.transformer, inputs, self.goal.video_weight, self.goal.audio_weight)
        return self.result.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Sets the step's learning rate, clips, and keeps the norm for the log."""
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        limit = self.clip if self.clip > 0 else float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters_in_training, limit)
        self._unchecked.append((self.step + 1, self._keys, OnHost(self.grad_norm)))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the batch on the CPU: noising is cheap there, and what goes to the device is final."""
        return batch

    def refuse_nonfinite(self, pending: int = 0) -> None:
        """DivergedError if a gradient norm was not finite; the newest `pending` norms are left for later.

        Training looks one step back, at norms that have long arrived; a save looks at all, so that no
        damaged weights are ever committed.
        """
        while len(self._unchecked) > pending:
            step, keys, norm = self._unchecked.pop(0)
            if not math.isfinite(norm.value()):
                raise DivergedError(
                    f"the gradient of step {step} is not finite (samples {', '.join(keys)}): "
                    "lower optim.lr or check these clips; the last checkpoint is unharmed"
                )
