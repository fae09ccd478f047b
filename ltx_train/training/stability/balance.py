"""The loss weight of each modality: the configured weight, optionally divided by a moving average of the loss.

Owns the moving averages, which are the same on every rank and part of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ltx_train.contracts import StepResult
from ltx_train.diffusion.loss import Weights
from ltx_train.distributed.ranks import Ranks


class Balance:
    """decay: of the moving averages; None keeps the configured weights.

    With a decay, weight_m = configured_m * mean(averages) / average_m, so that both modalities contribute alike
    whatever their number of tokens. Computing the weights does not wait for the device.
    """

    def __init__(
        self, *, video: float, audio: float, levels: str, decay: float | None, device: torch.device
    ) -> None:  # fmt: skip
        self._configured = torch.tensor([video, audio], device=device)
        self._plain = Weights(video, audio, levels)
        self._decay = decay
        self._averages = torch.full((2,), float("nan"), device=device)
        self._sums = torch.zeros(4, device=device)

    @property
    def weights(self) -> Weights:
        """The loss weights of the next micro-batch."""
        if self._decay is None:
            return self._plain
        effective = self._effective()
        return Weights(effective[0], effective[1], self._plain.levels)

    def add(self, result: StepResult) -> None:
        """Adds the unweighted losses of a micro-batch."""
        if self._decay is None:
            return
        for number, loss in enumerate((result.video, result.audio)):
            if loss is not None:
                self._sums[number] += loss.detach().sum()
                self._sums[number + 2] += len(loss)

    def step(self, ranks: Ranks) -> None:
        """Updates the moving averages after an optimizer step with the means over all micro-batches and ranks."""
        if self._decay is None:
            return
        ranks.average([self._sums])
        means = self._sums[:2] / self._sums[2:]
        started = torch.where(self._averages.isnan(), means, self._averages)
        moved = torch.lerp(means, started, self._decay)
        # A modality that was absent from this step, or whose loss was not finite, keeps its average.
        self._averages = torch.where(means.isfinite(), moved, self._averages)
        self._sums = torch.zeros_like(self._sums)

    def row(self) -> dict[str, float]:
        """The effective weights by metric name; empty when the configured weights apply."""
        if self._decay is None:
            return {}
        return dict(zip(("train/weight_video", "train/weight_audio"), self._effective().tolist(), strict=True))

    def state(self) -> list[float | None]:
        """JSON values; float32 numbers survive the round trip exactly."""
        return [None if math.isnan(value) else value for value in self._averages.tolist()]

    def restore(self, state: Sequence[float | None]) -> None:
        values = [float("nan") if value is None else value for value in state]
        self._averages = torch.tensor(values, device=self._averages.device)

    def _effective(self) -> Tensor:
        known = self._averages.isfinite() & (self._averages > 0)
        mean = torch.nanmean(torch.where(known, self._averages, torch.nan))
        return torch.where(known, self._configured * mean / self._averages, self._configured)
