"""What a run's time went into: steps that count against everything else, and arithmetic against the hardware's.

Owns two shares: model FLOP/s over the device's rate, and productive seconds over the seconds since the
run was first started anywhere. Its state goes into checkpoints, so that repeated steps do not count twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """peak_flops: what the device could do per second; None: not known, and no share of it is reported."""

    def __init__(self, peak_flops: float | None) -> None:
        self._peak = peak_flops
        self._started = time.time()
        self._productive = self._interval = self._flops = 0.0
        self._began: float | None = None

    def begin(self) -> None:
        """A micro-batch is there and is being trained on."""
        self._began = time.perf_counter()

    def end(self, flops: float) -> None:
        """It is done; flops: the model's own arithmetic for it, recomputation not counted."""
        if self._began is None:
            return
        seconds = time.perf_counter() - self._began
        self._productive += seconds
        self._interval += seconds
        self._flops += flops
        self._began = None

    def row(self) -> dict[str, float]:
        """SlicedParameters by their documented names: of the time since the last row, and of the run's whole life."""
        found = {"run/goodput": min(1.0, self._productive / max(1e-9, time.time() - self._started))}
        if self._peak and self._interval:
            found["perf/mfu"] = self._flops / self._interval / self._peak
        self._interval = self._flops = 0.0
        return found

    def state(self) -> dict[str, float]:
        return {"started": self._started, "productive_s": self._productive}

    def restore(self, state: Mapping[str, float]) -> None:
        self._started, self._productive = state["started"], state["productive_s"]
