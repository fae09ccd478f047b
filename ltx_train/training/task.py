"""The Lightning module: one training step, and nothing about files, signals or reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import Batch, Mode, StepResult
from ltx_train.diffusion import conditions, mixture, objective, transfer
from ltx_train.diffusion.conditions import TokenWeights
from ltx_train.diffusion.mixture import Weighted
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.memory.graph import StepGraphs
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.training.average import Average
from ltx_train.training.balance import Balance
from ltx_train.training.guard import NonFiniteGuard
from ltx_train.training.optim import Schedule
from ltx_train.training.ranks import Ranks
from ltx_train.training.spikes import Spikes
from ltx_train.training.updates import Updates


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: the modes with their weights, noise levels, weights of tokens, and the seed of all draws."""

    modes: Weighted
    sigma: SigmaDistribution
    token_weights: TokenWeights
    seed: int


class Task(LightningModule):
    """Trains whatever parameters of the transformer require gradients, from optimizer step `first_step` on.

    rounds: micro-batches of this rank per optimizer step. in_step: ranks exchange something in every pass, so that all
    go through the same ones. Optimization is manual: `updates` averages gradients over the ranks, and a step whose
    gradient is not finite, or one of the `spikes`, changes nothing. detailed: at which steps the gradient's norm is
    wanted by part of the block. flops: the model's arithmetic for a forward and backward pass.
    graphs: of `objective.backward` for this transformer, where passes are recorded.
    """

    def __init__(
        self, transformer: Transformer, goal: Objective, schedule: Schedule, updates: Updates,
        clip: float, first_step: int, rounds: int, ranks: Ranks, balance: Balance, average: Average | None,
        detailed: Callable[[int], bool] = lambda _step: False,
        flops: Callable[[conditions.ModelInputs], float] = lambda _inputs: 0.0, graphs: StepGraphs | None = None,
        in_step: bool = False, spikes: Spikes | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.transformer = transformer
        self.goal, self.schedule, self.clip, self.first_step = goal, schedule, clip, first_step
        self.balance, self.average, self.spikes = balance, average, spikes
        self.guard = NonFiniteGuard(ranks.rank)
        self.results: list[StepResult] = []
        self.flops = 0.0
        self.grad_norm: Tensor | None = None
        self.grad_norms: dict[str, Tensor] = {}
        self.updates, self._rounds, self._ranks, self._detailed = updates, rounds, ranks, detailed
        self._dropout = adapter.DropoutKeys(transformer)
        self._keys: tuple[str, ...] = ()
        self._round = self._done = 0
        self._count, self._graphs, self._in_step = flops, graphs, in_step
        self._pass: Callable[[objective.Pass], StepResult] = graphs or partial(objective.backward, transformer)

    @property
    def step(self) -> int:
        """Optimizer steps done in this run's whole life."""
        return self.first_step + self._done

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch: a forward and a backward pass for each mode that its samples are in."""
        # All but the newest norm: that one is still on its way, and asking would stop the host.
        self.guard.check(pending=1)
        self._keys += batch.keys
        self.results, self.flops = [], 0.0
        for mode, part, share in self._passes(batch):
            result = self._backward(mode, part, share)
            if share:
                self.balance.add(result)
                self.results.append(result)
        self._round += 1
        if self._round == self._rounds:
            self._update()

    def release(self) -> None:
        """Gives back device memory that is only held between steps."""
        if self._graphs is not None:
            self._graphs.release()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.updates.optimizer

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the batch on the CPU: noising is cheap there, and what goes to the device is final."""
        return batch

    def _passes(self, batch: Batch) -> list[tuple[Mode, Batch, float]]:
        """The batch by mode, and what of the gradient each part is; in step with the others, a rank that has no sample
        in a mode takes one along that counts nothing."""
        goal = self.goal
        own = [(m, part, len(part.keys) / len(batch.keys)) for m, part in mixture.parts(batch, goal.modes, goal.seed)]
        if not self._in_step or len(goal.modes) == 1:
            return own
        chosen = [next((one for one in own if one[0] is mode), None) for _, mode in goal.modes]
        everyone = self._ranks.gather([one is not None for one in chosen])
        idle = [(mode, mixture.select(batch, [0]), 0.0) for _, mode in goal.modes]
        wanted = [any(present) for present in zip(*everyone, strict=True)]
        return [one or other for one, other, go in zip(chosen, idle, wanted, strict=True) if go]

    def _backward(self, mode: Mode, batch: Batch, share: float) -> StepResult:
        goal = self.goal
        pairs = zip(batch.keys, batch.draws, strict=True)
        self._dropout.set([rng.key_seed(goal.seed, "dropout", key, draw) for key, draw in pairs])
        draws = conditions.draw(batch, mode, goal.sigma, goal.seed)
        inputs = conditions.assemble(batch, mode, draws, goal.token_weights)
        self.flops += self._count(inputs) if share else 0.0
        given = objective.Pass(transfer.to_device(inputs, self.device), self.balance.weights, share / self._rounds)
        result = self._pass(given)
        self.updates.passed()
        return result

    def _update(self) -> None:
        """One optimizer step on the gradients of all rounds and ranks."""
        self.updates.average()
        if self._detailed(self.step + 1):
            self.grad_norms = self.updates.norms()
        for group in self.updates.optimizer.param_groups:
            # A function of the step alone: a run that goes on needs no state of a scheduler.
            group["lr"] = self.schedule.at(self.step)
        limit = None if self.spikes is None else self.spikes.limit()
        self.grad_norm = self.updates.step(self.clip, limit)
        self.guard.saw(self.step + 1, self._keys, self.grad_norm, limit)
        if self.spikes is not None and limit is not None:
            self.spikes.saw(self.grad_norm, limit)
        self.balance.step(self._ranks)
        self._done += 1
        if self.average is not None:
            self.average.update(self.step)
        self._round, self._keys = 0, ()
