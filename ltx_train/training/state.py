"""The state of a run between steps beside weights and optimizer, and its part in the notes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltx_train.distributed.ranks import Ranks
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.stability.coded_products import ProductChoice
from ltx_train.training.stability.early_stop import EarlyStop
from ltx_train.training.step import OptimizerStep
from ltx_train.training.tracking.clock import Clock
from ltx_train.training.tracking.monitor import Monitor


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """step: the optimizer step. monitor: the unfinished logging interval. early_stop: the best measurement. clock: the
    run's productive time. base: the fingerprint of the base model. products: None without 8-bit products."""

    step: OptimizerStep
    monitor: Monitor
    early_stop: EarlyStop
    clock: Clock
    base: str
    products: ProductChoice | None = None

    def notes(self, ranks: Ranks) -> Mapping[str, Any]:
        """Returns the state as JSON values for a checkpoint. Collective."""
        recipe = self.step.recipe
        return {
            "base": self.base, "monitor": self.monitor.state(ranks), "balance": recipe.balance.state(),
            "spikes": None if recipe.spikes is None else recipe.spikes.state(),
            "selection": self.early_stop.state(), "ended": self.early_stop.reason, "clock": self.clock.state(),
            "dense_products": None if self.products is None else self.products.state(),
        }  # fmt: skip

    def restore(self, checkpoint: Checkpoint, ranks: Ranks) -> None:
        """Restores weights, optimizer and notes from a checkpoint."""
        recipe, notes = self.step.recipe, checkpoint.notes
        recipe.updates.restore(checkpoint.weights, checkpoint.optimizer)
        self.monitor.restore(notes["monitor"], ranks)
        # Checkpoints of earlier releases lack some of these notes.
        if "balance" in notes:
            recipe.balance.restore(notes["balance"])
        if recipe.spikes is not None and notes.get("spikes"):
            recipe.spikes.restore(notes["spikes"])
        if "selection" in notes:
            self.early_stop.restore(notes["selection"])
        if "clock" in notes:
            self.clock.restore(notes["clock"])
        if self.products is not None:
            self.products.restore(notes.get("dense_products", []))
        if recipe.average is not None:
            recipe.average.restore(checkpoint.average or checkpoint.weights)
