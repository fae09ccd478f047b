"""The Lightning module: one training step, and nothing about files, signals or reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import Batch, Mode, StepResult
from ltx_train.diffusion import conditions, objective
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.training.guard import NonFiniteGuard, step_if_finite
from ltx_train.training.optim import Schedule
from ltx_train.training.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: mode, noise levels, weights of the modalities, and the seed of all draws."""

    mode: Mode
    sigma: SigmaDistribution
    video_weight: float
    audio_weight: float
    seed: int


class Task(LightningModule):
    """Trains whatever parameters of the transformer require gradients, from optimizer step `first_step` on.

    rounds: micro-batches of this rank per optimizer step. Optimization is manual: gradients are averaged over
    the ranks once a step, and a step whose gradient is not finite changes nothing.
    """

    def __init__(
        self, transformer: Transformer, goal: Objective, schedule: Schedule, optimizer: torch.optim.Optimizer,
        clip: float, first_step: int, rounds: int, ranks: Ranks,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.transformer = transformer
        self.goal, self.schedule, self.clip, self.first_step = goal, schedule, clip, first_step
        self.guard = NonFiniteGuard(ranks.rank)
        self.result: StepResult | None = None
        self.grad_norm: Tensor | None = None
        self._optimizer, self._rounds, self._ranks = optimizer, rounds, ranks
        self._parameters_in_training = list(adapter.trainable_parameters(transformer).values())
        self._dropout = adapter.DropoutKeys(transformer)
        self._keys: tuple[str, ...] = ()
        self._round = self._done = 0

    @property
    def step(self) -> int:
        """Optimizer steps done in this run's whole life."""
        return self.first_step + self._done

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.guard.check(pending=1)
        self._keys += batch.keys
        pairs = zip(batch.keys, batch.draws, strict=True)
        self._dropout.set([rng.key_seed(self.goal.seed, "dropout", key, draw) for key, draw in pairs])
        draws = conditions.draw(batch, self.goal.mode, self.goal.sigma, self.goal.seed)
        inputs = conditions.to_device(conditions.assemble(batch, self.goal.mode, draws), self.device)
        self.result = self.losses(inputs)
        self.manual_backward(self.result.loss / self._rounds)
        self._round += 1
        if self._round == self._rounds:
            self._update()

    def losses(self, inputs: conditions.ModelInputs) -> StepResult:
        return objective.losses(self.transformer, inputs, self.goal.video_weight, self.goal.audio_weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the batch on the CPU: noising is cheap there, and what goes to the device is final."""
        return batch

    def _update(self) -> None:
        """One optimizer step on the gradients of all rounds and ranks."""
        parameters = self._parameters_in_training
        for parameter in parameters if self._ranks.world > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.average([p.grad for p in parameters if p.grad is not None])
        limit = self.clip if self.clip > 0 else float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        self.guard.saw(self.step + 1, self._keys, self.grad_norm)
        step_if_finite(self._optimizer, self.grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1
        self._round, self._keys = 0, ()
