"""The best measured step, and when training ends for lack of a better one.

Owns the comparison of held-out losses over a run's whole life; its state goes into checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOSS = "val/loss"


class EarlyStop:
    """patience: measurements in a row without a better loss that end the run; 0: never."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.best_step: int | None = None
        self._best = float("inf")
        self._stale = 0

    def record(self, step: int, values: Mapping[str, float]) -> bool:
        """Takes one measurement; whether it is the best so far."""
        if LOSS not in values:
            return False
        if values[LOSS] < self._best:
            self.best_step, self._best, self._stale = step, values[LOSS], 0
            return True
        self._stale += 1
        return False

    @property
    def reason(self) -> str | None:
        """Why training ends, None while it goes on."""
        if not self._patience or self._stale < self._patience:
            return None
        return f"no better held-out loss in {self._stale} measurements since step {self.best_step}"

    def state(self) -> dict[str, Any]:
        return {
            "step": self.best_step,
            "loss": self._best if self.best_step is not None else None,
            "stale": self._stale,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["step"] is not None:
            self.best_step, self._best = state["step"], state["loss"]
        self._stale = state["stale"]
