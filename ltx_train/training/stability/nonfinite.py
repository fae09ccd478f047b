"""Counts steps whose gradient was not finite or a spike, and ends the run when there are too many.

The optimizer skips such a step on the device (`updates.optimizers.step_within`); this module counts it on the host.
"""

from __future__ import annotations

import math
import sys
from collections import deque

import torch
from torch import Tensor

from ltx_train.contracts import DivergedError

_STREAK, _WINDOW, _SHARE = 5, 1000, 0.01


class AsyncScalar:
    """A scalar that is being copied to the host. `value` waits for that copy alone, not for kernels queued after it."""

    def __init__(self, scalar: Tensor) -> None:
        self._value, self._arrived = scalar.detach(), None
        if scalar.is_cuda:
            self._value = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._value.copy_(scalar.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


class NonFiniteGuard:
    """Watches gradient norms, which are equal on all ranks, one step behind the device."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._waiting: list[tuple[int, tuple[str, ...], AsyncScalar, AsyncScalar | None]] = []
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._streak = 0
        self.skipped = 0

    def record(self, step: int, keys: tuple[str, ...], norm: Tensor, limit: Tensor | None = None) -> None:
        """Queues the gradient norm of a step (from 1) and its limit. keys: this rank's samples in the step."""
        self._waiting.append((step, keys, AsyncScalar(norm), None if limit is None else AsyncScalar(limit)))

    def check(self, pending: int = 0) -> None:
        """Counts bad norms, except the newest `pending` ones. Raises DivergedError after five bad steps in a row, or
        when more than one percent of the last thousand steps were bad."""
        while len(self._waiting) > pending:
            step, keys, norm, limit = self._waiting.pop(0)
            bound = math.inf if limit is None else limit.value()
            bad = not math.isfinite(norm.value()) or norm.value() > bound
            self._recent.append(bad)
            self._streak = self._streak + 1 if bad else 0
            self.skipped += bad
            if bad:
                self._report(step, keys, norm.value(), bound)

    def _report(self, step: int, keys: tuple[str, ...], norm: float, bound: float) -> None:
        samples = f"rank {self._rank} had samples {', '.join(keys)}"
        spike = math.isfinite(norm)
        problem = f"has norm {norm:.4g}, a spike above {bound:.4g}" if spike else "is not finite"
        if self._streak >= _STREAK or sum(self._recent) > _SHARE * _WINDOW:
            raise DivergedError(
                f"the gradient of step {step} {problem}, {self._streak} in a row and {sum(self._recent)} of the "
                f"last {len(self._recent)} ({samples}): lower optim.lr or check these clips; "
                "none of these steps changed the weights, and the last checkpoint is intact"
            )
        print(f"ltx-train: the gradient of step {step} {problem}: skipped ({samples})", file=sys.stderr)
