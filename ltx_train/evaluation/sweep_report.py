"""report.html of a search: its trials, their held-out losses, and the settings behind them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ltx_train import durable
from ltx_train.evaluation import sheet


@dataclass(frozen=True, kw_only=True)
class Trial:
    """value: the final held-out loss, None for a pruned or failed trial; course: held-out loss by step."""

    number: int
    params: Mapping[str, Any]
    value: float | None
    state: str
    course: Mapping[int, float]


def write(path: Path, title: str, trials: Sequence[Trial]) -> None:
    """Writes the page atomically; the page needs no network."""
    durable.write(path, render(title, trials))


def render(title: str, trials: Sequence[Trial]) -> str:
    ranked = sorted(trials, key=lambda t: (t.value is None, t.value or 0.0, t.number))
    plots = [_parallel(ranked), _courses(trials)] if any(t.value is not None for t in trials) else []
    return sheet.page(title, "\n".join([*plots, _table(ranked)]))


def _table(ranked: Sequence[Trial]) -> str:
    names = sorted({name for trial in ranked for name in trial.params})
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("trial", *names, "held-out loss", "end"))
    rows = ""
    for trial in ranked:
        value = "" if trial.value is None else f"{trial.value:.5f}"
        cells = (str(trial.number), *(_short(trial.params.get(n, "")) for n in names), value, trial.state)
        rows += "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
    return f"<h2>Trials, best first</h2><table><tr>{head}</tr>{rows}</table>"


def _parallel(ranked: Sequence[Trial]) -> str:
    """Parallel coordinates: one line per complete trial through its settings to its loss; darker lines are better."""
    complete = [t for t in ranked if t.value is not None]
    names = sorted({name for trial in complete for name in trial.params})
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    for number, trial in enumerate(reversed(complete), start=1):
        heights = [_height(trial.params[n], [t.params[n] for t in complete]) for n in names]
        heights.append(_height(trial.value, [t.value for t in complete]))
        good = number / len(complete)
        axes.plot(range(len(heights)), heights, color=pyplot.cm.viridis(1 - good), alpha=0.35 + 0.6 * good, lw=1 + good)
    axes.set_xticks(range(len(names) + 1), [*names, "held-out loss"])
    columns: list[list[Any]] = [*([t.params[name] for t in complete] for name in names), [t.value for t in complete]]
    for x, column in enumerate(columns):
        values = sorted(set(column), key=str)
        low, high = (values[0], values[-1]) if isinstance(values[0], str) else (min(values), max(values))
        axes.annotate(_short(low), (x, -0.09), ha="center", fontsize=8)
        axes.annotate(_short(high), (x, 1.04), ha="center", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.15, 1.12)
    return f"<h2>Settings and what they gave</h2>{sheet.picture(figure)}"


def _courses(trials: Sequence[Trial]) -> str:
    figure, axes = pyplot.subplots(figsize=(9, 3.2))
    for trial in trials:
        if trial.course:
            steps, values = zip(*sorted(trial.course.items()), strict=True)
            style = "-" if trial.value is not None else ":"
            axes.plot(steps, values, style, marker="o", ms=3, lw=1, label=str(trial.number))
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.legend(title="trial", fontsize=7, ncols=4)
    return f"<h2>Held-out loss by step; dotted: pruned or failed</h2>{sheet.picture(figure)}"


def _height(value: Any, column: Sequence[Any]) -> float:
    """Position of a value in [0, 1] between the smallest and the largest of a column.

    Numbers whose ratio exceeds 20 are on a log scale; strings are in alphabetical order.
    """
    if isinstance(value, str):
        options = sorted(set(column))
        return options.index(value) / max(1, len(options) - 1)
    numbers = [float(v) for v in column]
    low, high, number = min(numbers), max(numbers), float(value)
    if low > 0 and high / low > 20:
        low, high, number = math.log(low), math.log(high), math.log(number)
    return 0.5 if high == low else (number - low) / (high - low)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
