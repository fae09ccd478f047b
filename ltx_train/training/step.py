"""One optimizer step: draw, assemble, copy to the device, forward and backward, average gradients, update.

`fit`, `bench` and the GPU tests share it. Owns the order of these operations and the state between micro-batches.
Knows no files, signals or reports. `Task` is the Lightning module around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import Batch, Mode, StepResult, UserError
from ltx_train.diffusion import conditions, mixture, transfer
from ltx_train.diffusion.conditions import ModelInputs, TokenWeights
from ltx_train.diffusion.mixture import Weighted
from ltx_train.diffusion.objective import MicroBatch
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.distributed.ranks import Ranks
from ltx_train.model.transformer import Transformer
from ltx_train.training.schedule import Schedule
from ltx_train.training.stability.average import Average
from ltx_train.training.stability.balance import Balance
from ltx_train.training.stability.nonfinite import NonFiniteGuard
from ltx_train.training.stability.spikes import Spikes
from ltx_train.updates.protocol import Updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The training objective: modes with their weights, noise levels, token weights, and the seed of all draws."""

    modes: Weighted
    sigma: SigmaDistribution
    token_weights: TokenWeights
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecipe:
    """The parts and settings of an optimizer step.

    backward: runs forward and backward of a micro-batch (`diffusion.objective.backward` of a model, or its CUDA
    graphs). release: frees the device memory that `backward` holds between steps. set_dropout_keys: takes one key per
    sample of the next micro-batch. micro_batches: their number per rank and optimizer step. lockstep: ranks
    communicate within a pass, so every rank runs the same passes. detailed: whether the gradient norm of a step is
    logged for each part of the block. flops: returns the model FLOPs of a micro-batch.
    """

    objective: Objective
    backward: Callable[[MicroBatch], StepResult]
    release: Callable[[], None]
    set_dropout_keys: Callable[[list[int]], None]
    updates: Updates
    schedule: Schedule
    clip: float
    micro_batches: int
    ranks: Ranks
    device: torch.device
    balance: Balance
    average: Average | None
    spikes: Spikes | None
    lockstep: bool
    detailed: Callable[[int], bool]
    flops: Callable[[ModelInputs], float]


class OptimizerStep:
    """Accumulates the gradients of `micro_batches` micro-batches, then updates the weights.

    first_step: optimizer steps that the run did before this process.
    """

    def __init__(self, recipe: StepRecipe, first_step: int) -> None:
        self.recipe, self.first_step = recipe, first_step
        self.guard = NonFiniteGuard(recipe.ranks.rank)
        # Results of the newest micro-batch.
        self.results: list[StepResult] = []
        self.flops = 0.0
        # Gradient norms of the newest optimizer step: total, and by part of the block.
        self.grad_norm: Tensor | None = None
        self.grad_norms: dict[str, Tensor] = {}
        self._keys: tuple[str, ...] = ()
        self._accumulated = self._done = 0

    @property
    def step(self) -> int:
        """Optimizer steps of the run so far, including those before a restart."""
        return self.first_step + self._done

    def micro_batch(self, batch: Batch) -> None:
        """Runs a forward and a backward pass for each mode of a micro-batch. batch: on the CPU."""
        # Skip the newest norm: the device is still computing it, and reading it would block the host.
        self.guard.check(pending=1)
        self._keys += batch.keys
        self.results, self.flops = [], 0.0
        for mode, part, share in self._passes(batch):
            result = self._backward(mode, part, share)
            if share:
                self.recipe.balance.add(result)
                self.results.append(result)
        self._accumulated += 1
        if self._accumulated == self.recipe.micro_batches:
            self._update()

    def _passes(self, batch: Batch) -> list[tuple[Mode, Batch, float]]:
        """Splits a batch by mode. Returns each mode with its samples and their share of the gradient.

        In lockstep, a rank without samples in a mode runs one of its samples with share 0.
        """
        goal, recipe = self.recipe.objective, self.recipe
        parts = mixture.parts(batch, goal.modes, goal.seed)
        passes = [(mode, part, len(part.keys) / len(batch.keys)) for mode, part in parts]
        if not recipe.lockstep or len(goal.modes) == 1:
            return passes
        by_mode = [next((entry for entry in passes if entry[0] is mode), None) for _, mode in goal.modes]
        of_all_ranks = recipe.ranks.gather([entry is not None for entry in by_mode])
        fillers = [(mode, mixture.select(batch, [0]), 0.0) for _, mode in goal.modes]
        runs = [any(present) for present in zip(*of_all_ranks, strict=True)]
        return [entry or filler for entry, filler, is_run in zip(by_mode, fillers, runs, strict=True) if is_run]

    def _backward(self, mode: Mode, batch: Batch, share: float) -> StepResult:
        goal, recipe = self.recipe.objective, self.recipe
        pairs = zip(batch.keys, batch.draws, strict=True)
        recipe.set_dropout_keys([rng.key_seed(goal.seed, "dropout", key, draw) for key, draw in pairs])
        draws = conditions.draw(batch, mode, goal.sigma, goal.seed)
        inputs = conditions.assemble(batch, mode, draws, goal.token_weights)
        self.flops += recipe.flops(inputs) if share else 0.0
        on_device = transfer.to_device(inputs, recipe.device)
        result = recipe.backward(MicroBatch(on_device, recipe.balance.weights, share / recipe.micro_batches))
        recipe.updates.end_pass()
        return result

    def _update(self) -> None:
        """Updates the weights with the gradients of all micro-batches and ranks."""
        recipe, updates = self.recipe, self.recipe.updates
        updates.average()
        if recipe.detailed(self.step + 1):
            self.grad_norms = updates.norms()
        for group in updates.optimizer.param_groups:
            # The learning rate depends on the step alone, so a resumed run needs no scheduler state.
            group["lr"] = recipe.schedule.at(self.step)
        limit = None if recipe.spikes is None else recipe.spikes.limit()
        self.grad_norm = updates.step(recipe.clip, limit)
        self.guard.record(self.step + 1, self._keys, self.grad_norm, limit)
        if recipe.spikes is not None and limit is not None:
            recipe.spikes.record(self.grad_norm, limit)
        recipe.balance.step(recipe.ranks)
        self._done += 1
        if recipe.average is not None:
            recipe.average.update(self.step)
        self._accumulated, self._keys = 0, ()


class Task(LightningModule):
    """The Lightning module around an optimizer step, with manual optimization."""

    def __init__(self, transformer: Transformer, optimizer_step: OptimizerStep) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.transformer, self.step_of_run = transformer, optimizer_step

    def training_step(self, batch: Batch | UserError, batch_idx: int) -> None:
        if isinstance(batch, UserError):
            raise batch
        try:
            self.step_of_run.micro_batch(batch)
        except StopIteration as error:
            # Lightning would take it for the end of the data and end the run without a word.
            raise RuntimeError("an iterator inside the training step ended") from error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lightning drops all gradients before it trains. Here they belong to `updates`, and some keep their memory."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.step_of_run.recipe.updates.optimizer

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the batch on the CPU: noising is cheap there, and only finished inputs go to the device."""
        return batch
