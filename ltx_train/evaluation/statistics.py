"""Means with 95 % intervals over identities. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its 95 % interval (nan with fewer than two identities)."""

    mean: float
    half: float
    identities: int

    @property
    def excludes_zero(self) -> bool:
        return not math.isnan(self.half) and abs(self.mean) > self.half

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.4f} (one identity: no interval)" if self.identities else "nothing measured"
        return f"{self.mean:+.4f} ± {self.half:.4f} ({self.identities} identities)"

    @property
    def compared(self) -> str:
        """As a difference to the best of several."""
        return f"{self}{'' if self.excludes_zero else ', not distinguishable'}"

    @property
    def plain(self) -> str:
        """As a cell of a table: without a sign, and without what is not known."""
        if math.isnan(self.mean):
            return ""
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


def by_identity(values: Mapping[str, Sequence[float]]) -> Interval:
    """Student's t interval over the means of the identities, since clips of one person are not independent.

    values: identity -> the values of its clips. All identities have equal weight.
    """
    means = [sum(v) / len(v) for v in values.values() if v]
    count = len(means)
    if count == 0:
        return Interval(math.nan, math.nan, 0)
    mean = sum(means) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    variance = sum((m - mean) ** 2 for m in means) / (count - 1)
    return Interval(mean, float(student.ppf(0.975, count - 1)) * math.sqrt(variance / count), count)
