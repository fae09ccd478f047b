"""Training metrics of a logging interval: losses per modality and noise level, times, memory.

Owns the accumulation between two logged rows. Its state is part of checkpoints, so that a row that spans an
interruption has the same losses as without one.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ltx_train.contracts import StepResult
from ltx_train.distributed.ranks import ALONE, Ranks

_BUCKETS = 4
_BINS = 10


class Monitor:
    """Collects step results; `row` averages and clears them. Tensors stay on their device until then."""

    def __init__(self, video_weight: float, audio_weight: float, planned_gib: float | None = None) -> None:
        self._weights = {"video": video_weight, "audio": audio_weight}
        self._planned_gib = planned_gib
        self._parts: dict[str, list[Tensor]] = {}
        self._steps = 0
        # Seconds of the interval before this start of the run.
        self._elapsed = self._waited = 0.0
        self._started = self._edge = time.perf_counter()

    def begin(self) -> None:
        """Call when training starts: what came before, such as loading, belongs to no step."""
        self._started = self._edge = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Adds the result of a micro-batch, or of its samples in one mode."""
        total = torch.zeros_like(result.sigma)
        for name, loss in (("video", result.video), ("audio", result.audio)):
            # In a mixture of modes, samples without a modality have no loss for it.
            self._keep(name, torch.full_like(total, torch.nan) if loss is None else loss)
            if loss is not None:
                total = total + self._weights[name] * loss.detach()
        self._keep("total", total)
        self._keep("sigma", result.sigma)

    def data_arrived(self) -> None:
        """Call when a batch has arrived: the run has waited for it since the end of the previous batch."""
        self._waited += time.perf_counter() - self._edge

    def step_done(self) -> None:
        self._steps += 1

    @contextmanager
    def paused(self) -> Generator[None]:
        """Time that is no step's, and no wait for data: held-out measurement, and the clips that are generated."""
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self._started += passed
            self._edge += passed

    def batch_done(self) -> None:
        self._edge = time.perf_counter()

    def row(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Averages over all ranks since the last row, by metric name (docs/metrics.md)."""
        values = {name: torch.tensor(parts).double() for name, parts in self._gathered(ranks).items()}
        # Losses that are not finite belong to skipped steps, which the guard counts.
        finite = torch.isfinite(values["total"])
        values = {name: numbers[finite] for name, numbers in values.items()}
        row = {"train/loss": float(values["total"].mean())}
        for name in ("video", "audio"):
            known = values[name][values[name].isfinite()] if name in values else values["total"][:0]
            row |= {f"train/loss_{name}": float(known.mean())} if len(known) else {}
        row |= _by_level(values["sigma"], values["total"])
        now = time.perf_counter()
        row["perf/step_s"] = (self._elapsed + now - self._started) / max(1, self._steps)
        row["perf/data_wait_s"] = self._waited / max(1, self._steps)
        if torch.cuda.is_available():
            row["mem/peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
            if self._planned_gib:
                row["mem/plan_error"] = row["mem/peak_gib"] / self._planned_gib - 1
        self._parts, self._steps, self._waited, self._elapsed, self._started = {}, 0, 0.0, 0.0, now
        return row

    def state(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """The unfinished interval as JSON values; float32 numbers survive the round trip exactly."""
        elapsed = self._elapsed + time.perf_counter() - self._started
        return {
            "parts": self._gathered(ranks), "steps": self._steps, "elapsed_s": elapsed, "waited_s": self._waited,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        """Restores the interval. Rank 0 takes over the values of all ranks."""
        self._steps = state["steps"]
        # Checkpoints of 0.1.0 have no times.
        self._elapsed, self._waited = state.get("elapsed_s", 0.0), state.get("waited_s", 0.0)
        if not ranks.leads:
            return
        self._parts = {name: [torch.tensor(values)] for name, values in state["parts"].items()}

    def _gathered(self, ranks: Ranks) -> dict[str, list[float]]:
        local = {name: torch.cat([t.cpu() for t in tensors]).tolist() for name, tensors in self._parts.items()}
        of_all_ranks = ranks.gather(local)
        names = sorted({name for parts in of_all_ranks for name in parts})
        return {name: [value for parts in of_all_ranks for value in parts.get(name, [])] for name in names}

    def _keep(self, name: str, values: Tensor) -> None:
        self._parts.setdefault(name, []).append(values.detach())


def _by_level(sigma: Tensor, total: Tensor) -> dict[str, float]:
    """The mean loss in four ranges of the noise level, and the histogram of noise levels in ten ranges."""
    row: dict[str, float] = {}
    indices = (sigma * _BUCKETS).long().clamp(0, _BUCKETS - 1)
    for bucket in range(_BUCKETS):
        if bool((indices == bucket).any()):
            name = f"train/loss_sigma/{bucket / _BUCKETS:.2f}-{(bucket + 1) / _BUCKETS:.2f}"
            row[name] = float(total[indices == bucket].mean())
    counts = torch.bincount((sigma * _BINS).long().clamp(0, _BINS - 1), minlength=_BINS).double()
    shares = (counts / max(1, len(sigma))).tolist()
    return row | {f"train/sigma_share/{i / _BINS:.1f}-{(i + 1) / _BINS:.1f}": share for i, share in enumerate(shares)}
