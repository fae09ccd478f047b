"""Measured rows and their statistics: means and paired differences with their intervals.

Owns the arithmetic of comparisons and the documented metric names. Pure; needs no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

from ltx_train.evaluation.statistics import Interval, by_identity

CORRECT, WRONG, DROPPED, NEUTRAL, CAPTION, BASE = "correct", "wrong", "dropped", "neutral", "caption", "base"
ARMS = (CORRECT, WRONG, DROPPED, NEUTRAL, CAPTION, BASE)
# Each arm with the adapter off.
OFF: Mapping[str, str] = {
    CORRECT: BASE, WRONG: "base wrong", DROPPED: "base dropped", NEUTRAL: "base neutral", CAPTION: "base caption",
}  # fmt: skip
# By the arm that the correct one is compared with: the gap with the adapter on, with it off, and their difference.
_GAPS = {
    WRONG: ("val/reference_gap", "val/base_gap", "val/gained_gap"),
    DROPPED: ("val/reference_gap_dropped", "val/base_gap_dropped", "val/gained_gap_dropped"),
    NEUTRAL: ("val/reference_gap_neutral", "val/base_gap_neutral", "val/gained_gap_neutral"),
    CAPTION: ("val/caption_gap", "val/base_caption_gap", "val/gained_caption_gap"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Losses of one sample at one noise level under one arm; nan for a modality that is not generated."""

    key: str
    speaker: str
    sigma: float
    arm: str
    loss: float
    video: float
    audio: float


@dataclass(frozen=True, slots=True)
class Grid:
    """Noise levels of a measurement.

    quantiles: quantiles of the training distribution, so that their mean weighs levels as training does.
    uniform: levels chosen independently of training.
    """

    quantiles: tuple[float, ...]
    uniform: tuple[float, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(sorted({*self.quantiles, *self.uniform}))

    @property
    def main(self) -> tuple[float, ...]:
        """The levels whose mean is the held-out loss."""
        return self.quantiles or self.uniform


def summary(rows: Sequence[Row], grid: Grid) -> dict[str, float]:
    """Metrics for metrics.jsonl and W&B under their documented names (docs/metrics.md).

    Sorts the rows first, so that rows gathered from several ranks give exactly the numbers of a single process.
    """
    rows = sorted(rows, key=lambda r: (r.key, r.sigma, r.arm, r.loss))
    main = [row for row in rows if row.sigma in grid.main]
    values: dict[str, float] = {}
    for name, column in (("val/loss", "loss"), ("val/loss_video", "video"), ("val/loss_audio", "audio")):
        values |= _named(name, mean(main, CORRECT, column))
    if grid.quantiles and grid.uniform:
        values["val/loss_uniform"] = mean([r for r in rows if r.sigma in grid.uniform], CORRECT).mean
    for sigma in sorted({row.sigma for row in rows}):
        level_rows = [row for row in rows if row.sigma == sigma]
        values[f"val/loss_sigma/{sigma:g}"] = mean(level_rows, CORRECT).mean
        for name, value in _gaps(level_rows, WRONG).items():
            values[f"{name}_sigma/{sigma:g}"] = value.mean
    for arm in _GAPS:
        for name, value in _gaps(main, arm).items():
            values |= _named(name, value)
    if has(main, BASE):
        values |= _named("val/adapter_gain", paired(main, CORRECT, BASE))
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _gaps(rows: Sequence[Row], other: str) -> dict[str, Interval]:
    """The gaps to an arm by metric name; without the base's where the base was not measured, empty without the arm."""
    on, off, own = _GAPS[other]
    if not has(rows, other):
        return {}
    found = {on: paired(rows, CORRECT, other)}
    if has(rows, OFF[other]):
        found |= {off: paired(rows, BASE, OFF[other]), own: gained(rows, other)}
    return found


def has(rows: Iterable[Row], arm: str) -> bool:
    return any(row.arm == arm for row in rows)


def mean(rows: Iterable[Row], arm: str, column: str = "loss") -> Interval:
    """Mean and interval of one arm over identities."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.arm == arm:
            values.setdefault(row.speaker, []).append(getattr(row, column))
    return by_identity(values)


def paired(rows: Iterable[Row], arm: str, other: str, column: str = "loss") -> Interval:
    """Interval of arm - other over identities; pairs share sample, noise level and noise."""
    return by_identity(differences(rows, arm, other, column))


def gained(rows: Sequence[Row], other: str, column: str = "loss") -> Interval:
    """Interval of what the adapter adds to a gap: (correct - other) with it, minus the same without it. All four losses
    share sample, noise level and noise, so what the base does by itself cancels."""
    return by_identity(gains(rows, other, column))


def gains(rows: Sequence[Row], other: str, column: str = "loss") -> dict[str, list[float]]:
    """The value of each identity for `gained`."""
    on, off = differences(rows, CORRECT, other, column), differences(rows, BASE, OFF[other], column)
    return {who: [sum(on[who]) / len(on[who]) - sum(off[who]) / len(off[who])] for who in on}


def differences(rows: Iterable[Row], arm: str, other: str, column: str = "loss") -> dict[str, list[float]]:
    """arm - other by identity; several rows of `other` for one sample and level are averaged first."""
    first: dict[tuple[str, float], float] = {}
    second: dict[tuple[str, float], list[float]] = {}
    speakers: dict[str, str] = {}
    for row in rows:
        speakers[row.key] = row.speaker
        if row.arm == arm:
            first[row.key, row.sigma] = getattr(row, column)
        elif row.arm == other:
            second.setdefault((row.key, row.sigma), []).append(getattr(row, column))
    by_speaker: dict[str, list[float]] = {}
    for (key, sigma), values in second.items():
        by_speaker.setdefault(speakers[key], []).append(first[key, sigma] - sum(values) / len(values))
    return by_speaker


def noise(measurements: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Standard deviations of the mean effects between measurements of the same clips with other noise, by metric name;
    empty for one measurement."""
    effects: dict[str, list[float]] = {}
    for rows in measurements:
        if has(rows, BASE):
            effects.setdefault("val/adapter_gain_noise", []).append(paired(rows, CORRECT, BASE).mean)
        if has(rows, WRONG):
            gap = gained(rows, WRONG) if has(rows, OFF[WRONG]) else paired(rows, CORRECT, WRONG)
            effects.setdefault("val/gained_gap_noise", []).append(gap.mean)
    return {name: stdev(means) for name, means in effects.items() if len(means) > 1}


def _named(name: str, value: Interval) -> dict[str, float]:
    return {name: value.mean, f"{name}_ci95": value.half}
