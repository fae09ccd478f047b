"""report.html of a search: its trials, their held-out losses, and the settings behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ltx_train import durable
from ltx_train.evaluation.history import Measured, difference
from ltx_train.pages.figures import picture, subplots, viridis
from ltx_train.pages.render import render as render_page
from ltx_train.pages.sections import Section, Table

_NOTE = "Differences to the best trial are paired by identity, with 95 % intervals."


@dataclass(frozen=True, kw_only=True)
class Trial:
    """value: the final held-out loss, None for a pruned or failed trial; course: held-out loss by step. measured: the
    losses of its last measurement by identity, None where they are not known."""

    number: int
    params: Mapping[str, Any]
    value: float | None
    state: str
    course: Mapping[int, float]
    measured: Measured | None = None


def write(path: Path, title: str, trials: Sequence[Trial]) -> None:
    """Writes the page atomically; the page needs no network."""
    durable.write(path, render(title, trials))


def render(title: str, trials: Sequence[Trial]) -> str:
    ranked = sorted(trials, key=lambda t: (t.value is None, t.value or 0.0, t.number))
    sections = [Section(title="Trials, best first", tables=[_table(ranked)], note=_NOTE)]
    if any(t.value is not None for t in trials):
        sections = [
            Section(title="Settings and what they gave", figures=[_parallel(ranked)]),
            Section(title="Held-out loss by step; dotted: pruned or failed", figures=[_courses(trials)]),
            *sections,
        ]
    return render_page("search.html.j2", title=title, sections=sections)


def _table(ranked: Sequence[Trial]) -> Table:
    names = sorted({name for trial in ranked for name in trial.params})
    best, rows = ranked[0] if ranked else None, list[Sequence[str]]()
    for trial in ranked:
        value = "" if trial.value is None else f"{trial.value:.5f}"
        values = (_short(trial.params.get(name, "")) for name in names)
        rows.append((str(trial.number), *values, value, _to_best(trial, best), trial.state))
    head = ("trial", *names, "held-out loss", "minus the best, paired", "end")
    return Table(head=head, rows=rows, marked=0 if best is not None and best.value is not None else None)


def _to_best(trial: Trial, best: Trial | None) -> str:
    """The paired difference to the best trial over identities, of trials that came to their end."""
    if best is None or trial is best or None in (trial.value, best.value, trial.measured, best.measured):
        return ""
    assert trial.measured is not None
    assert best.measured is not None
    if trial.measured.on != best.measured.on:
        return "measured on something else"
    return difference(trial.measured, best.measured).compared


def _parallel(ranked: Sequence[Trial]) -> Markup:
    """Parallel coordinates: one line per complete trial through its settings to its loss; darker lines are better."""
    complete = [t for t in ranked if t.value is not None]
    names = sorted({name for trial in complete for name in trial.params})
    figure, axes = subplots(figsize=(9, 3.6))
    for number, trial in enumerate(reversed(complete), start=1):
        heights = [_height(trial.params[n], [t.params[n] for t in complete]) for n in names]
        heights.append(_height(trial.value, [t.value for t in complete]))
        good = number / len(complete)
        axes.plot(range(len(heights)), heights, color=viridis(1 - good), alpha=0.35 + 0.6 * good, lw=1 + good)
    axes.set_xticks(range(len(names) + 1), [*names, "held-out loss"])
    columns: list[list[Any]] = [*([t.params[name] for t in complete] for name in names), [t.value for t in complete]]
    for x, column in enumerate(columns):
        values = sorted(set(column), key=str)
        low, high = (values[0], values[-1]) if isinstance(values[0], str) else (min(values), max(values))
        axes.annotate(_short(low), (x, -0.09), ha="center", fontsize=8)
        axes.annotate(_short(high), (x, 1.04), ha="center", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.15, 1.12)
    return picture(figure, "every line is a trial; darker ones are better")


def _courses(trials: Sequence[Trial]) -> Markup:
    figure, axes = subplots(figsize=(9, 3.2))
    for trial in trials:
        if trial.course:
            steps, values = zip(*sorted(trial.course.items()), strict=True)
            style = "-" if trial.value is not None else ":"
            axes.plot(steps, values, style, marker="o", ms=3, lw=1, label=str(trial.number))
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.legend(title="trial", fontsize=7, ncols=4)
    return picture(figure, "held-out loss of every trial by step")


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
