"""Predicts what a run on several machines sends between them, and how long its steps take then.

Owns the formulas of the traffic. The time of a step within a machine is `footprint`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_train.memory.planning.footprint import TrainedWeights

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


def traffic(trained: TrainedWeights, machines: int, *, dtype_bytes: int, gathers_within: bool) -> Traffic:
    """Of collectives in rings: a gather or a reduction brings (machines - 1) / machines of its bytes into a machine.

    gathers_within: whether backward gathers within a machine (hpZ). The frozen base of an adapter never crosses.
    """
    crossing = (machines - 1) / machines * trained.parameters
    if not trained.full:
        # An all-reduce, or a reduction to slices and a gather of updated ones: twice either way. After the passes.
        return Traffic(weights=_FLOAT32 * crossing, gradients=_FLOAT32 * crossing, overlaps=False)
    gathers = trained.accumulate * (1 if gathers_within else 2) if trained.stage == 3 else 1
    reductions = trained.accumulate if trained.stage > 1 else 1
    return Traffic(
        weights=gathers * dtype_bytes * crossing, gradients=reductions * _FLOAT32 * crossing, overlaps=trained.stage > 1
    )
