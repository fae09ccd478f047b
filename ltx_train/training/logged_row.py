"""The row of training metrics at a logged step, by metric name (docs/metrics.md)."""

from __future__ import annotations

import math
import sys

from ltx_train.distributed.ranks import Ranks
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.training.cadence import Cadence
from ltx_train.training.state import RunState


class TrainingRows:
    """Collects the metrics of the interval since the last row."""

    def __init__(self, state: RunState, transformer: Transformer, cadence: Cadence, ranks: Ranks) -> None:
        self._state, self._transformer, self._cadence, self._ranks = state, transformer, cadence, ranks
        self._last = state.step.first_step
        self._is_dead_reported = False

    def row(self) -> dict[str, float]:
        """Returns the row without values that are not finite. Collective."""
        step = self._state.step
        recipe = step.recipe
        assert step.grad_norm is not None
        row = self._state.monitor.row(self._ranks)
        row |= {"train/grad_norm": float(step.grad_norm), "optim/lr": recipe.schedule.at(step.step - 1)}
        row |= {f"train/grad_norm/{group}": float(norm) for group, norm in step.grad_norms.items()}
        row |= recipe.balance.row() | self._state.clock.row()
        if adapter.is_attached(self._transformer):
            with recipe.updates.whole():
                row |= self._adapter()
        runner = self._transformer.run_block
        if isinstance(runner, BlockRunner) and isinstance(runner.stream, WeightStream):
            row["perf/stream_stall_s"] = runner.stream.stall_seconds() / max(1, step.step - self._last)
        if step.guard.skipped:
            row["run/skipped_steps"] = step.guard.skipped
        self._last = step.step
        return {name: value for name, value in row.items() if math.isfinite(value)}

    def _adapter(self) -> dict[str, float]:
        """The norm ratios of the adapter and the number of its unchanged layers. Prints the latter once."""
        ratios = adapter.norm_ratios(self._transformer)
        row = {f"train/adapter_norm_ratio/{group}".rstrip("/"): ratio for group, ratio in ratios.items()}
        if self._state.step.step < self._cadence.dead_after:
            return row
        dead = adapter.unmoved(self._transformer)
        if dead and not self._is_dead_reported and self._ranks.leads:
            print(f"ltx-train: {len(dead)} adapter layers have not moved since the start: {dead[0]}", file=sys.stderr)
        self._is_dead_reported = True
        return {**row, "train/dead_adapters": len(dead)}
