"""Predicts what a run on several machines sends between them, and how long its steps take then.

Owns the formulas of the traffic. The time of a step within a machine is `duration`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_train.memory.planning.sizes import TrainedWeights

# Bytes of a gradient, and of an adapter's weight, on their way between ranks.
_FLOAT32 = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that enter each machine in an optimizer step. overlaps: whether they travel beside the computation."""

    weights: float
    gradients: float
    overlaps: bool

    @property
    def total(self) -> float:
        return self.weights + self.gradients

    def step_s(self, within_s: float, link_gbs: float) -> float:
        """Seconds of a step that takes within_s within a machine. link_gbs: GB/s into a machine, over all its cards."""
        network = self.total / (link_gbs * 1e9)
        return max(within_s, network) if self.overlaps else within_s + network


def traffic(trained: TrainedWeights, world: int, *, dtype_bytes: int, gathers_within: bool) -> Traffic:
    """Of collectives in rings over `world` ranks. A gather or a reduction brings (world - 1) / world of its bytes into
    a machine, an all-reduce twice as many.

    gathers_within: whether backward gathers within a machine (hpZ). The frozen base of an adapter never crosses.
    """
    crossing = (world - 1) / world * trained.parameters
    if not trained.full:
        # DeepSpeed reduces an adapter's gradients by an all-reduce, and gathers its updated weights. After the passes.
        weights = _FLOAT32 * crossing if trained.stage else 0.0
        return Traffic(weights=weights, gradients=2 * _FLOAT32 * crossing, overlaps=False)
    gathers = trained.accumulate * (1 if gathers_within else 2) if trained.stage == 3 else 1
    reductions = trained.accumulate if trained.stage > 1 else 1
    return Traffic(
        weights=gathers * dtype_bytes * crossing, gradients=reductions * _FLOAT32 * crossing, overlaps=trained.stage > 1
    )
