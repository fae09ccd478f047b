"""Figures of the report: matplotlib plots as inline PNG.

Owns how numbers are drawn; means over identities have 95 % intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ltx_train.evaluation import alike, sheet
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.rows import (
    ARMS,
    BASE,
    CAPTION,
    CORRECT,
    DROPPED,
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

T = TypeVar("T")

INK = {CORRECT: "#1f6f8b", WRONG: "#c8553d", DROPPED: "#b08900", CAPTION: "#6a4c93", BASE: "#8d8d8d"}
TITLES = {
    CORRECT: "adapter", WRONG: "wrong reference", DROPPED: "no reference", CAPTION: "another clip's caption",
    BASE: "base (adapter off)",
}  # fmt: skip
_IDENTITIES = 40


def curves(metrics: Sequence[Mapping[str, float]]) -> str:
    """Training and held-out loss, gained gaps and adapter gain over steps; empty without a training loss."""
    if not any("train/loss" in row for row in metrics):
        return ""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4))
    _over_steps(axes[0], metrics, "train/loss", "#b9c6cc")
    measured = [row for row in metrics if "val/loss" in row]
    metrics = alike.only(measured, alike.main(measured))  # what was measured on something else is no point of the curve
    gap = "gained_gap" if any("val/gained_gap" in row for row in metrics) else "reference_gap"
    for axis, name, ink in (
        (axes[0], "val/loss", INK[CORRECT]), (axes[1], f"val/{gap}", INK[WRONG]),
        (axes[1], f"val/{gap}_dropped", INK[DROPPED]), (axes[1], "val/adapter_gain", INK[BASE]),
    ):  # fmt: skip
        _over_steps(axis, metrics, name, ink)
    axes[1].axhline(0, color="black", lw=0.7)
    for axis in axes:
        _dress(axis, "step", "")
    return _picture(figure, "training and held-out curves, 95 % intervals")


def levels_of_training(metrics: Sequence[Mapping[str, float]]) -> str:
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
        return ""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.0))
    axes[0].bar(list(shares), [sum(v) / len(v) for v in shares.values()], color=INK[CORRECT])
    axes[0].tick_params(axis="x", labelrotation=60, labelsize=7)
    for name, points in sorted(losses.items()):
        axes[1].plot(*zip(*points, strict=True), label=name, lw=1)
    _dress(axes[0], "noise level drawn", "share")
    _dress(axes[1], "step", "training loss by noise level")
    return _picture(figure, "noise levels drawn in training, and the training loss by noise level")


def by_level(rows: Sequence[Row], arms: Sequence[str] = ARMS) -> str:
    """Held-out loss of every arm over the noise level."""
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    for arm in arms:
        _bars(axis, {s: mean([r for r in rows if r.sigma == s], arm) for s in _levels(rows)}, TITLES[arm], INK[arm])
    _dress(axis, "noise level", "held-out loss")
    return _picture(figure, "held-out loss by noise level, 95 % intervals")


def differences_by_level(rows: Sequence[Row]) -> str:
    """Correct minus every other arm over the noise level, less the same of the base where it was measured."""
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
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


def differences_by_identity(rows: Sequence[Row]) -> str:
    """Correct minus wrong reference (gained), and minus base, for every identity."""
    shown = [arm for arm in (WRONG, BASE) if has(rows, arm)]
    if not shown:
        return ""
    by_arm = {
        arm: gains(rows, arm) if has(rows, OFF.get(arm, "")) else differences(rows, CORRECT, arm) for arm in shown
    }
    values = {arm: {who: sum(v) / len(v) for who, v in found.items()} for arm, found in by_arm.items()}
    order = sorted(values[shown[0]], key=lambda who: values[shown[0]][who])[:_IDENTITIES]
    figure, axis = pyplot.subplots(figsize=(6, 1.2 + 0.22 * len(order)))
    for arm in shown:
        axis.plot([values[arm][who] for who in order], order, "o", ms=4, color=INK[arm], label=f"minus {TITLES[arm]}")
    axis.axvline(0, color="black", lw=0.7)
    axis.tick_params(axis="y", labelsize=7)
    _dress(axis, "difference of the loss", "")
    return _picture(figure, "differences by identity")


def attention(masses: Sequence[Mass]) -> str:
    """Attention on the references by block, relative to an even spread over all keys."""
    if not masses:
        return ""
    figure, axis = pyplot.subplots(figsize=(6, 2.8))
    for sigma in sorted({m.sigma for m in masses}):
        blocks = sorted({m.block for m in masses})
        by_block = [[m for m in masses if m.block == b and m.sigma == sigma] for b in blocks]
        points = [sum(m.share for m in ms) / sum(m.even for m in ms) for ms in by_block]
        axis.plot(blocks, points, marker=".", lw=1, label=f"noise level {sigma:g}")
    axis.axhline(1, color="black", lw=0.7)
    _dress(axis, "block", "attention on the reference\nrelative to an even spread")
    return _picture(figure, "attention on reference tokens by block")


def compared_by_step(runs: Mapping[str, Mapping[int, Interval]], base: Interval | None) -> str:
    """Held-out loss of several steps, a line for each run, and of the base."""
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    for name, points, ink in _inked(runs):
        _bars(axis, points, name if len(runs) > 1 else "held-out loss", ink)
    if base is not None and base.identities:
        axis.axhline(base.mean, color=INK[BASE], ls="--", label=TITLES[BASE])
    _dress(axis, "step", "held-out loss")
    return _picture(figure, "held-out loss by step, 95 % intervals")


def compared_by_level(subjects: Mapping[str, Sequence[Row]]) -> str:
    """Held-out loss of several adapters over the noise level."""
    figure, axis = pyplot.subplots(figsize=(7, 3.6))
    for name, rows, ink in _inked(subjects):
        points = {s: mean([r for r in rows if r.sigma == s], CORRECT) for s in _levels(rows)}
        _bars(axis, points, name, ink)
    _dress(axis, "noise level", "held-out loss")
    return _picture(figure, "held-out loss of every adapter by noise level, 95 % intervals")


def compared_by_identity(subjects: Mapping[str, Sequence[Row]]) -> str:
    """Held-out loss of several adapters for every identity."""
    figure, axis = pyplot.subplots(figsize=(7, 3.6))
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
        yield name, values, pyplot.get_cmap("viridis")(number / max(1, len(subjects) - 1))


def _over_steps(axis: Any, metrics: Sequence[Mapping[str, float]], name: str, ink: str) -> None:
    points = [(row["step"], row[name], row.get(f"{name}_ci95", math.nan)) for row in metrics if name in row]
    if not points:
        return
    steps, means, halves = zip(*points, strict=True)
    axis.plot(steps, means, label=name, color=ink, marker="." if name.startswith("val") else "", lw=1.2)
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


def _picture(figure: Any, description: str) -> str:
    figure.tight_layout()
    return sheet.picture(figure, description)
