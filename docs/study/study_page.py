"""The study's table, its figure, and their place in docs/study.md. Knows the results, not how they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_MARKS = ("<!-- results: written by make study -->", "<!-- end -->")


def plot(results: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """One panel for each data set of `names`, one line for each seed."""
    figure, axes = pyplot.subplots(2, len(names) // 2, figsize=(14, 6), sharex=True)
    for axis, name in zip(axes.flat, names, strict=True):
        for record in (r for r in results if r["case"] == name):
            levels: dict[float, dict[str, float]] = record["gap_by_level"]  # type: ignore[assignment]
            means, halves = ([v[k] for v in levels.values()] for k in ("mean", "half"))
            axis.errorbar(list(levels), means, halves, capsize=2, marker=".", label=f"seed {record['seed']}")
        axis.axhline(0, color="black", lw=0.7)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("noise level")
    for row in axes:
        row[0].set_ylabel("loss(correct) - loss(wrong)")
    axes[1][-1].set_ylabel("the same, gained by the adapter")
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _cell(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.4f} ± {interval['half']:.4f}"


def _effect(effect: dict[str, float]) -> str:
    return f"{effect['mean']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]"


def page(results: list[dict[str, Any]], seconds: int, path: Path) -> None:
    """Writes the table into the page, between its marks."""
    lines = [
        f"{len(results)} trainings in {seconds} s on one core.", "",
        "| data | seed | verdict | gap, 95 % | against none | against a neutral one | likeness |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    changes: list[str] = []
    gains: list[str] = []
    sweeps: list[str] = []
    swaps: list[str] = []
    for record in results:
        likeness = record["likeness"]
        cells = [_cell(record[name]) for name in ("gap", "gap_dropped", "gap_neutral")]
        lines.append(
            f"| {record['case']} | {record['seed']} | `{record['found']}` | {' | '.join(cells)} | {likeness:+.2f} |"
        )
        if "change_of_gap" in record:
            change: dict[str, float] = record["change_of_gap"]  # type: ignore[assignment]
            changes.append(f"| {record['seed']} | {change['mean']:+.4f} ± {change['half']:.4f} |")
        if "gained" in record:
            own, base = record["gained"], record["base_gap"]
            numbers = [f"{v['mean']:+.4f} ± {v['half']:.4f}" for v in (own, base)]
            alone = record["alone"][1]["mean"] - record["alone"][0]["mean"]
            gains.append(f"| {record['case']} | {record['seed']} | {' | '.join(numbers)} | {alone:+.4f} |")
            swept = " | ".join(_cell(interval) for interval in record["gained_by_strength"].values())
            sweeps.append(f"| {record['case']} | {record['seed']} | {swept} |")
            shares = " | ".join(_effect(record["swap"][name]) for name in ("adapter", "base", "gained", "beyond_seed"))
            swaps.append(f"| {record['case']} | {record['seed']} | `{record['swap']['found']}` | {shares} |")
    lines += ["", "Change of the gap by training at higher noise levels, paired by identity:", ""]
    lines += ["| seed | change, 95 % |", "|---|---|", *changes, ""]
    lines += ["What adapters gained on a base that reads half of an identity:", ""]
    lines += [
        "| data | seed | gained gap, 95 % | the base's own gap | gained share |",
        "|---|---|---|---|---|",
        *gains,
        "",
        "The gained gap by the adapter's strength:",
        "",
        "| data | seed | 0 | 0.5 | 1 | 1.5 |",
        "|---|---|---|---|---|---|",
        *sweeps,
        "",
        "The swap test: the share of two identities' difference that generated clips take over when the reference is",
        "swapped, and how far that moves them beyond the seed:",
        "",
        "| data | seed | verdict | with the adapter | base | gained | beyond the seed |",
        "|---|---|---|---|---|---|---|",
        *swaps,
        "",
    ]
    before, _, rest = path.read_text().partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    path.write_text("\n".join([before + _MARKS[0], "", *lines, _MARKS[1] + after]))
