"""Figures of the report.

Owns how numbers are drawn. Intervals are of differences between pairs, at 95 % over identities. The spread between
people is no measure of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from markupsafe import Markup

from ltx_train.evaluation import alike
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.history import Measured, difference
from ltx_train.evaluation.rows import (
    ARMS,
    BASE,
    CAPTION,
    CORRECT,
    DROPPED,
    NEUTRAL,
    OFF,
    WRONG,
    Row,
    differences,
    gained,
    gains,
    has,
    mean,
    paired,
)
from ltx_train.evaluation.statistics import Interval, by_identity
from ltx_train.pages.figures import picture, subplots, viridis

T = TypeVar("T")

INK = {
    CORRECT: "#1f6f8b",
    WRONG: "#c8553d",
    DROPPED: "#b08900",
    NEUTRAL: "#4f8a3c",
    CAPTION: "#6a4c93",
    BASE: "#8d8d8d",
}
TITLES = {
    CORRECT: "adapter", WRONG: "wrong reference", DROPPED: "no reference", NEUTRAL: "neutral reference",
    CAPTION: "another clip's caption",
    BASE: "base (adapter off)",
}  # fmt: skip
_IDENTITIES = 40


def curves(metrics: Sequence[Mapping[str, float]], measured: Sequence[Measured]) -> Markup | None:
    """Over steps: training loss and held-out loss; the held-out loss's paired change since the first measurement; what
    the adapter changes. None without a training loss."""
    if not any("train/loss" in row for row in metrics):
        return None
    figure, axes = subplots(1, 3, figsize=(12, 3.4))
    _over_steps(axes[0], metrics, "train/loss", "training", "#b9c6cc")
    rows = [row for row in metrics if "val/loss" in row]
    alike_rows = alike.only(rows, alike.main(rows))  # what was measured on something else is no point of the curve
    steps = [{"step": row["step"], "val/loss": row["val/loss"]} for row in alike_rows]
    _over_steps(axes[0], steps, "val/loss", "held out", INK[CORRECT])
    _bars(axes[1], _changes(measured, alike.main(rows)), "held-out loss", INK[CORRECT])
    gap = "gained_gap" if any("val/gained_gap" in row for row in alike_rows) else "reference_gap"
    gap_title = "gained gap" if gap == "gained_gap" else "reference gap"
    for name, title, ink in (
        (f"val/{gap}", gap_title, INK[WRONG]), (f"val/{gap}_dropped", f"{gap_title}, no reference", INK[DROPPED]),
        (f"val/{gap}_neutral", f"{gap_title}, neutral reference", INK[NEUTRAL]),
        ("val/adapter_gain", "adapter on minus off", INK[CORRECT]),
    ):  # fmt: skip
        _over_steps(axes[2], alike_rows, name, title, ink)
    for axis, y in zip(axes, ("loss", "change since the first measurement", "difference of the loss"), strict=True):
        _dress(axis, "step", y)
    for axis in axes[1:]:
        axis.axhline(0, color="black", lw=0.7)
    return _picture(figure, "training and held-out loss; paired changes and differences with 95 % intervals")


def _changes(measured: Sequence[Measured], on: int | None) -> dict[int, Interval]:
    """The held-out loss of each step minus that of the first, by identity."""
    same = [m for m in measured if m.on == on]
    return {m.step: difference(m, same[0]) for m in same[1:]}


def levels_of_training(metrics: Sequence[Mapping[str, float]]) -> Markup | None:
    """Share of training draws per range of noise levels, and the training loss in each range over steps."""
    shares: dict[str, list[float]] = {}
    losses: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith("train/sigma_share/"):
                shares.setdefault(name.rsplit("/", 1)[1], []).append(value)
            elif name.startswith("train/loss_sigma/"):
                losses.setdefault(name.rsplit("/", 1)[1], []).append((row["step"], value))
    if not shares:
        return None
    figure, axes = subplots(1, 2, figsize=(10, 3.0))
    axes[0].bar(list(shares), [sum(v) / len(v) for v in shares.values()], color=INK[CORRECT])
    axes[0].tick_params(axis="x", labelrotation=60, labelsize=7)
    for name, points in sorted(losses.items()):
        axes[1].plot(*zip(*points, strict=True), label=name, lw=1)
    _dress(axes[0], "noise level drawn", "share")
    _dress(axes[1], "step", "training loss by noise level")
    return _picture(figure, "noise levels drawn in training, and the training loss by noise level")


def by_level(rows: Sequence[Row], arms: Sequence[str] = ARMS) -> Markup | None:
    """Held-out loss of every arm over the noise level."""
    figure, axis = subplots(figsize=(6, 3.4))
    for arm in (arm for arm in arms if has(rows, arm)):
        means = [mean([r for r in rows if r.sigma == s], arm).mean for s in _levels(rows)]
        axis.plot(_levels(rows), means, label=TITLES[arm], color=INK[arm], marker=".", lw=1.2)
    _dress(axis, "noise level", "held-out loss")
    return _picture(figure, "held-out loss by noise level, mean over identities")


def differences_by_level(rows: Sequence[Row]) -> Markup | None:
    """Correct minus every other arm over the noise level, less the same of the base where it was measured."""
    figure, axis = subplots(figsize=(6, 3.4))
    for arm in (arm for arm in ARMS[1:] if has(rows, arm)):
        by_level = {s: [r for r in rows if r.sigma == s] for s in _levels(rows)}
        own = has(rows, OFF.get(arm, ""))
        points = {s: gained(some, arm) if own else paired(some, CORRECT, arm) for s, some in by_level.items()}
        _bars(axis, points, f"minus {TITLES[arm]}{', gained' if own else ''}", INK[arm])
    axis.axhline(0, color="black", lw=0.7)
    _dress(axis, "noise level", "difference of the loss")
    return _picture(
        figure, "differences by noise level, 95 % intervals; below zero: the adapter with correct inputs is better"
    )


def differences_by_identity(rows: Sequence[Row]) -> Markup | None:
    """Correct minus wrong reference (gained), and minus base, for every identity."""
    shown = [arm for arm in (WRONG, BASE) if has(rows, arm)]
    if not shown:
        return None
    by_arm = {
        arm: gains(rows, arm) if has(rows, OFF.get(arm, "")) else differences(rows, CORRECT, arm) for arm in shown
    }
    values = {arm: {who: sum(v) / len(v) for who, v in found.items()} for arm, found in by_arm.items()}
    order = sorted(values[shown[0]], key=lambda who: values[shown[0]][who])[:_IDENTITIES]
    figure, axis = subplots(figsize=(6, 1.2 + 0.22 * len(order)))
    for arm in shown:
        axis.plot([values[arm][who] for who in order], order, "o", ms=4, color=INK[arm], label=f"minus {TITLES[arm]}")
    axis.axvline(0, color="black", lw=0.7)
    axis.tick_params(axis="y", labelsize=7)
    _dress(axis, "difference of the loss", "")
    return _picture(figure, "differences by identity")


def by_strength(strengths: Mapping[float, Sequence[Row]]) -> Markup | None:
    """What the adapter changes at each of its strengths; 0 is the base."""
    if len(strengths) < 2:
        return None
    figure, axis = subplots(figsize=(6, 3.2))
    gains_by = {s: paired(rows, CORRECT, BASE) for s, rows in strengths.items() if has(rows, BASE)}
    gaps_by = {s: gained(rows, WRONG) for s, rows in strengths.items() if has(rows, OFF[WRONG])}
    _bars(axis, gains_by, "adapter on minus off", INK[CORRECT])
    _bars(axis, gaps_by, "gained gap", INK[WRONG])
    axis.axhline(0, color="black", lw=0.7)
    _dress(axis, "strength of the adapter", "difference of the loss")
    return _picture(figure, "effect of the adapter by its strength, 95 % intervals")


def attention(masses: Sequence[Mass]) -> Markup | None:
    """Attention on the references by block, relative to an even spread over all keys."""
    if not masses:
        return None
    figure, axis = subplots(figsize=(6, 2.8))
    for sigma in sorted({m.sigma for m in masses}):
        blocks = sorted({m.block for m in masses})
        by_block = [[m for m in masses if m.block == b and m.sigma == sigma] for b in blocks]
        points = [sum(m.share for m in ms) / sum(m.even for m in ms) for ms in by_block]
        axis.plot(blocks, points, marker=".", lw=1, label=f"noise level {sigma:g}")
    axis.axhline(1, color="black", lw=0.7)
    _dress(axis, "block", "attention on the reference\nrelative to an even spread")
    return _picture(figure, "attention on reference tokens by block")


def compared_by_step(runs: Mapping[str, Mapping[int, Interval]]) -> Markup | None:
    """Held-out loss of several steps minus that of the base, a line for each run."""
    figure, axis = subplots(figsize=(6, 3.4))
    for name, points, ink in _inked(runs):
        _bars(axis, points, name if len(runs) > 1 else "held-out loss", ink)
    axis.axhline(0, color=INK[BASE], ls="--", label=TITLES[BASE])
    _dress(axis, "step", "difference of the loss")
    return _picture(figure, "held-out loss minus the base's by step, 95 % intervals")


def compared_by_level(subjects: Mapping[str, Sequence[Row]]) -> Markup | None:
    """Held-out loss of several adapters minus that of the base over the noise level."""
    figure, axis = subplots(figsize=(7, 3.6))
    for name, rows, ink in _inked({name: rows for name, rows in subjects.items() if has(rows, BASE)}):
        points = {s: paired([r for r in rows if r.sigma == s], CORRECT, BASE) for s in _levels(rows)}
        _bars(axis, points, name, ink)
    axis.axhline(0, color=INK[BASE], ls="--", label=TITLES[BASE])
    _dress(axis, "noise level", "difference of the loss")
    return _picture(figure, "held-out loss of every adapter minus the base's by noise level, 95 % intervals")


def compared_by_identity(subjects: Mapping[str, Sequence[Row]]) -> Markup | None:
    """Held-out loss of several adapters for every identity."""
    figure, axis = subplots(figsize=(7, 3.6))
    for name, rows, ink in _inked(subjects):
        losses: dict[str, list[float]] = {}
        for row in rows:
            if row.arm == CORRECT:
                losses.setdefault(row.speaker, []).append(row.loss)
        order = sorted(losses)[:_IDENTITIES]
        axis.plot(order, [by_identity({w: losses[w]}).mean for w in order], "o", ms=4, color=ink, label=name)
    axis.tick_params(axis="x", labelrotation=70, labelsize=7)
    _dress(axis, "", "held-out loss")
    return _picture(figure, "held-out loss of every adapter by identity")


def _inked(subjects: Mapping[str, T]) -> Iterator[tuple[str, T, Any]]:
    """(name, values, colour) of every subject; each has another colour."""
    for number, (name, values) in enumerate(subjects.items()):
        yield name, values, viridis(number / max(1, len(subjects) - 1))


def _over_steps(axis: Any, metrics: Sequence[Mapping[str, float]], name: str, title: str, ink: str) -> None:
    points = [(row["step"], row[name], row.get(f"{name}_ci95", math.nan)) for row in metrics if name in row]
    if not points:
        return
    steps, means, halves = zip(*points, strict=True)
    axis.plot(steps, means, label=title, color=ink, marker="." if name.startswith("val") else "", lw=1.2)
    low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
    axis.fill_between(steps, low, high, alpha=0.18, color=ink)


def _bars(axis: Any, points: Mapping[Any, Interval], label: str, ink: Any) -> None:
    known = {x: p for x, p in points.items() if p.identities}
    if known:
        halves = [0 if math.isnan(p.half) else p.half for p in known.values()]
        means = [p.mean for p in known.values()]
        axis.errorbar(list(known), means, halves, label=label, color=ink, capsize=2, marker=".", lw=1.2)


def _levels(rows: Sequence[Row]) -> list[float]:
    return sorted({row.sigma for row in rows})


def _dress(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7)


def _picture(figure: Any, description: str) -> Markup:
    figure.tight_layout()
    return picture(figure, description)
