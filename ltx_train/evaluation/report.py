"""report.html: one file, no network, plots and tables of a run a person can read.

Owns presentation. Gets rows and numbers, computes only what a plot needs.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ltx_train.evaluation.rows import BASE, CORRECT, WRONG, Row, paired
from ltx_train.evaluation.statistics import Interval, by_identity

_INK = {CORRECT: "#1f6f8b", WRONG: "#c8553d", BASE: "#8d8d8d"}
_TITLES = {CORRECT: "adapter, correct reference", WRONG: "adapter, wrong reference", BASE: "base (adapter off)"}


@dataclass(frozen=True)
class Report:
    """What is shown: facts of the run, rows of the metrics file, rows of the held-out measurement."""

    title: str
    facts: Mapping[str, str]
    metrics: Sequence[Mapping[str, float]]
    rows: Sequence[Row]


def write(path: Path, report: Report) -> None:
    """Writes the page atomically."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(render(report), encoding="utf-8")
    os.replace(temporary, path)


def render(report: Report) -> str:
    """The page as text."""
    sections = [_verdict(report.rows), _facts(report.facts), _curves(report.metrics)]
    if report.rows:
        sections += [_by_sigma(report.rows), _gap(report.rows), _table(report.rows)]
    body = "\n".join(s for s in sections if s)
    return _PAGE.format(title=html.escape(report.title), body=body)


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, and what they cannot say, in sentences."""
    if not rows:
        return ["Nothing is held out, so nothing about new identities can be said."]
    lines: list[str] = []
    if any(row.arm == BASE for row in rows):
        gain = paired(rows, CORRECT, BASE)
        lines.append(
            _sentence(
                "Adapter on minus off", gain, "the adapter lowers the held-out loss", "it raises the held-out loss"
            )
        )
    if any(row.arm == WRONG for row in rows):
        gap = paired(rows, CORRECT, WRONG)
        lines.append(
            _sentence(
                "Reference gap (correct minus wrong)",
                gap,
                "the model uses the reference",
                "the wrong reference serves better",
            )
        )
        lines.append(
            "A gap near zero does not prove that the reference is ignored: where the noised target still shows the "
            "identity, nothing is left for the reference to tell. Generation with the reference swapped decides then."
        )
    return lines or [
        "Held-out loss was measured; this mode has neither an adapter to switch off nor a reference to swap."
    ]


def _sentence(name: str, value: Interval, good: str, bad: str) -> str:
    if math.isnan(value.half):
        return f"{name}: {value.mean:+.4f} from {value.identities} identity: no interval, no conclusion."
    if not value.excludes_zero:
        return f"{name}: {value}, 95 %. The interval contains zero: no effect is shown."
    return f"{name}: {value}, 95 %. The interval excludes zero: {good if value.mean < 0 else bad}."


def _verdict(rows: Sequence[Row]) -> str:
    return "<h2>What the numbers say</h2>" + "".join(f"<p class=verdict>{html.escape(v)}</p>" for v in verdict(rows))


def _facts(facts: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f"<h2>The run</h2><table>{cells}</table>"


def _curves(metrics: Sequence[Mapping[str, float]]) -> str:
    if not any("train/loss" in row for row in metrics):
        return ""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4))
    for axis, names in zip(axes, (("train/loss", "val/loss"), ("val/reference_gap", "val/adapter_gain")), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if name.startswith("val") else "")
        _dress(axis, "step", "")
    gaps = [
        (r["step"], r["val/reference_gap"], r["val/reference_gap_ci95"])
        for r in metrics
        if "val/reference_gap_ci95" in r
    ]
    if gaps:
        steps, means, halves = zip(*gaps, strict=True)
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes[1].fill_between(steps, low, high, alpha=0.2)
    axes[1].axhline(0, color="black", lw=0.7)
    return f"<h2>Curves</h2>{_picture(figure, 'training and held-out curves')}"


def _by_sigma(rows: Sequence[Row]) -> str:
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    sigmas = sorted({row.sigma for row in rows})
    for arm in (CORRECT, WRONG, BASE):
        points = [_mean(rows, arm, s) for s in sigmas]
        if points[0].identities:
            halves = [0 if math.isnan(p.half) else p.half for p in points]
            axis.errorbar(sigmas, [p.mean for p in points], halves, label=_TITLES[arm], color=_INK[arm], capsize=3)
    _dress(axis, "noise level", "held-out loss")
    return f"<h2>Held-out loss by noise level</h2>{_picture(figure, 'held-out loss by noise level, 95 % intervals')}"


def _gap(rows: Sequence[Row]) -> str:
    if not any(row.arm == WRONG for row in rows):
        return ""
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    sigmas = sorted({row.sigma for row in rows})
    points = [paired([r for r in rows if r.sigma == s], CORRECT, WRONG) for s in sigmas]
    halves = [0 if math.isnan(p.half) else p.half for p in points]
    axis.errorbar(
        sigmas, [p.mean for p in points], halves, color=_INK[CORRECT], capsize=3, marker="o", label="gap, 95 %"
    )
    axis.axhline(0, color="black", lw=0.7)
    _dress(axis, "noise level", "loss(correct) - loss(wrong)")
    return f"<h2>Reference gap by noise level</h2>{_picture(figure, 'reference gap by noise level')}"


def _table(rows: Sequence[Row]) -> str:
    arms = [arm for arm in (CORRECT, WRONG, BASE) if any(row.arm == arm for row in rows)]
    head = "".join(f"<th>{_TITLES[arm]}</th>" for arm in arms)
    body = ""
    for sigma in sorted({row.sigma for row in rows}):
        cells = "".join(f"<td>{_mean(rows, arm, sigma).mean:.4f}</td>" for arm in arms)
        body += f"<tr><th>{sigma:g}</th>{cells}</tr>"
    return f"<h2>Table</h2><table><tr><th>noise level</th>{head}</tr>{body}</table>"


def _mean(rows: Sequence[Row], arm: str, sigma: float) -> Interval:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.arm == arm and row.sigma == sigma:
            values.setdefault(row.speaker, []).append(row.loss)
    return by_identity(values)


def _dress(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def _picture(figure: Any, description: str) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; }}
img {{ max-width: 100%; }} .verdict {{ background: #f3f6f7; padding: 0.5rem 0.8rem; border-left: 4px solid #1f6f8b; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
