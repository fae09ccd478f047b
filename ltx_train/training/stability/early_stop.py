"""Tracks the best measured step, and ends training when the held-out loss stops improving.

Owns the comparison of held-out losses over the complete run; its state is part of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOSS, MEASURED_ON = "val/loss", "val/measured_on"


class EarlyStop:
    """patience: number of measurements in a row without a better loss that ends the run; 0 never ends it."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.best_step: int | None = None
        self._best = float("inf")
        self._stale = 0
        self._on: float | None = None

    def record(self, step: int, values: Mapping[str, float]) -> bool:
        """Records a measurement. Returns whether its loss is the best so far.

        The first of another measurement, of other clips or noise levels, begins anew: its loss compares with none
        before.
        """
        if LOSS not in values:
            return False
        if values.get(MEASURED_ON) != self._on:
            self._on, self._best, self._stale = values.get(MEASURED_ON), float("inf"), 0
        if values[LOSS] < self._best:
            self.best_step, self._best, self._stale = step, values[LOSS], 0
            return True
        self._stale += 1
        return False

    @property
    def reason(self) -> str | None:
        """Why training ends; None while it continues."""
        if not self._patience or self._stale < self._patience:
            return None
        return f"no better held-out loss in {self._stale} measurements since step {self.best_step}"

    def state(self) -> dict[str, Any]:
        return {
            "step": self.best_step,
            "loss": self._best if self.best_step is not None else None,
            "stale": self._stale,
            "measured_on": self._on,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["step"] is not None:
            self.best_step, self._best = state["step"], state["loss"]
        self._stale, self._on = state["stale"], state.get("measured_on")
