"""The efficiency of a run: model FLOPs utilization (MFU) and goodput.

Owns two ratios: model FLOP/s over the device's peak rate, and productive seconds over the seconds since the first
start of the run on any machine. Its state is part of checkpoints, so that repeated steps do not count twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """peak_flops: the device's peak FLOP/s; None when it is not known, and MFU is not reported."""

    def __init__(self, peak_flops: float | None) -> None:
        self._peak = peak_flops
        self._started = time.time()
        self._productive = self._interval = self._flops = 0.0
        self._began: float | None = None

    def begin(self) -> None:
        """Call when training on a micro-batch begins."""
        self._began = time.perf_counter()

    def end(self, flops: float) -> None:
        """Call when the micro-batch is done. flops: its model FLOPs, without recomputation."""
        if self._began is None:
            return
        seconds = time.perf_counter() - self._began
        self._productive += seconds
        self._interval += seconds
        self._flops += flops
        self._began = None

    def row(self) -> dict[str, float]:
        """By metric name: MFU of the time since the last row; goodput and seconds of training of the complete run."""
        goodput = min(1.0, self._productive / max(1e-9, time.time() - self._started))
        values = {"run/goodput": goodput, "run/trained_s": self._productive}
        if self._peak and self._interval:
            values["perf/mfu"] = self._flops / self._interval / self._peak
        self._interval = self._flops = 0.0
        return values

    def state(self) -> dict[str, float]:
        return {"started": self._started, "productive_s": self._productive}

    def restore(self, state: Mapping[str, float]) -> None:
        self._started, self._productive = state["started"], state["productive_s"]
