"""report.html: what a run or several adapters do and do not do, in one file that needs no network.

Owns the page. Takes measured rows, computes only the numbers of its tables; `plots` draws the figures.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltx_train import durable
from ltx_train.contracts import Clip
from ltx_train.evaluation import plots, sheet
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.history import Measured, difference, of_rows
from ltx_train.evaluation.ranking import Entry, Ranking
from ltx_train.evaluation.rows import ARMS, BASE, CORRECT, OFF, WRONG, Grid, Row, gained, has, mean, paired
from ltx_train.evaluation.statistics import Interval
from ltx_train.evaluation.verdicts import Verdict


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One measured adapter (or full weights). run, step: where it was saved; empty and None for a file from elsewhere.

    Names are distinct within a report.
    """

    name: str
    run: str = ""
    step: int | None
    rows: Sequence[Row]
    masses: Sequence[Mass] = ()
    clips: Sequence[Clip] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of the page. subjects: the adapters just measured, best first; the first one gets all its figures.
    prompted: clips of the same prompt by the base and by the run's steps. commands: what to do with the best step."""

    title: str
    facts: Mapping[str, str]
    metrics: Sequence[Mapping[str, float]]
    subjects: Sequence[Subject]
    grid: Grid
    verdicts: Sequence[Verdict] = ()
    ranking: Ranking | None = None
    commands: Sequence[str] = ()
    references: Sequence[Clip] = field(default_factory=list[Clip])
    prompted: Mapping[str, Sequence[Clip]] = field(default_factory=dict[str, Sequence[Clip]])


def write(path: Path, report: Report) -> None:
    """Writes the page atomically."""
    durable.write(path, render(report))


def render(report: Report) -> str:
    """The page as HTML text."""
    sections = [_players(report), _verdicts(report.verdicts), _facts(report.facts)]
    if len(report.subjects) > 1:
        sections.append(_compared(report))
    sections += [_section("Curves", plots.curves(report.metrics), plots.levels_of_training(report.metrics))]
    if report.ranking is not None and report.ranking.entries:
        sections.append(_checkpoints(report.ranking, report.commands))
    if report.subjects and report.subjects[0].rows:
        sections += _details(report.subjects[0], many=len(report.subjects) > 1)
    return sheet.page(report.title, "\n".join(s for s in sections if s))


def _details(subject: Subject, *, many: bool) -> list[str]:
    """All sections about one subject; `many`: their titles name it."""
    rows = subject.rows
    suffix = f" of {subject.name}" if many else ""
    sections = [_section(f"Held-out loss by noise level{html.escape(suffix)}", plots.by_level(rows))]
    if any(row.arm != CORRECT for row in rows):
        sections.append(_section("What changes the loss", plots.differences_by_level(rows)))
        sections.append(_section("By identity", plots.differences_by_identity(rows)))
    if subject.masses:
        note = "<p>Attention shows that the model reads the reference, not that it uses it.</p>"
        sections.append(_section("Attention on the reference", note, plots.attention(subject.masses)))
    return [*sections, _table(rows)]


def _compared(report: Report) -> str:
    """Several adapters side by side: a table of paired differences, and curves by step, level and identity."""
    subjects = list(report.subjects)
    main = {s.name: [r for r in s.rows if r.sigma in report.grid.main] for s in subjects}
    best = of_rows(0, main[subjects[0].name])
    body = ""
    for subject in subjects:
        rows = main[subject.name]
        loss = mean(rows, CORRECT)
        to_best = _to_best(of_rows(0, rows), best) if subject is not subjects[0] else "the best"
        cells = [loss.plain, to_best]
        cells.append(str(paired(rows, CORRECT, BASE)) if has(rows, BASE) else "")
        cells.append(str(gained(rows, WRONG)) if has(rows, OFF[WRONG]) else "")
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr><th>{html.escape(subject.name)}</th>{row}</tr>"
    head = "<th>held-out loss</th><th>minus the best, paired</th><th>minus the base</th><th>gained gap</th>"
    by_step: dict[str, dict[int, Interval]] = {}
    for subject in sorted(subjects, key=lambda s: s.step or 0):
        if subject.step:
            by_step.setdefault(subject.run, {})[subject.step] = mean(main[subject.name], CORRECT)
    base = mean(main[subjects[0].name], BASE)
    pictures = [plots.compared_by_step(by_step, base)] if any(len(steps) > 1 for steps in by_step.values()) else []
    all_levels = {s.name: s.rows for s in subjects}
    pictures += [plots.compared_by_level(all_levels), plots.compared_by_identity(main)]
    return _section("Compared", f"<table><tr><th>adapter</th>{head}</tr>{body}</table>", *pictures)


def _to_best(measured: Measured, best: Measured) -> str:
    interval = difference(measured, best)
    return f"{interval}{'' if interval.excludes_zero else ', not distinguishable'}"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    sentences = "".join(f'<p class="verdict" data-kind="{v.kind.value}">{html.escape(v.text)}</p>' for v in verdicts)
    return f"<h2>Verdicts</h2>{sentences}"


def _checkpoints(ranking: Ranking, commands: Sequence[str]) -> str:
    """The steps by held-out loss, the best one marked, and what was measured on something else apart."""
    head = "".join(f"<th>{n}</th>" for n in ("step", "held-out loss, 95 %", "on minus off", "gained gap", "kept"))
    tables = [f"<table><tr>{head}</tr>{_entries(ranking.entries, marked=True)}</table>"]
    if commands:
        tables.append(f"<p>The best step:</p><pre>{html.escape(chr(10).join(commands))}</pre>")
    for described, entries in ranking.apart.items():
        title = f"<p>{html.escape(described)}, not comparable with these:</p>"
        tables.append(f"{title}<table><tr>{head}</tr>{_entries(entries, marked=False)}</table>")
    return _section("Checkpoints", *tables)


def _entries(entries: Sequence[Entry], *, marked: bool) -> str:
    body = ""
    for number, entry in enumerate(entries):
        gap = "" if entry.gap is None else f"{entry.gap:+.4f}{'' if entry.gained else ' (with the base)'}"
        cells = [
            str(entry.step), Interval(entry.loss, entry.half, 0).plain,
            "" if entry.gain is None else f"{entry.gain:+.4f}", gap, entry.kept.name if entry.kept else "",
        ]  # fmt: skip
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr{' class=best' if marked and not number else ''}>{row}</tr>"
    return body


def _facts(facts: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f"<h2>The run</h2><table>{cells}</table>"


def _table(rows: Sequence[Row]) -> str:
    arms = [arm for arm in ARMS if has(rows, arm)]
    head = "".join(f"<th>{plots.TITLES[arm]}</th>" for arm in arms)
    body = ""
    for sigma in sorted({row.sigma for row in rows}):
        means = [mean([r for r in rows if r.sigma == sigma], arm) for arm in arms]
        cells = "".join(f"<td>{value.plain}</td>" for value in means)
        body += f"<tr><th>{sigma:g}</th>{cells}</tr>"
    return f"<h2>Table</h2><table><tr><th>noise level</th>{head}</tr>{body}</table>"


def _players(report: Report) -> str:
    """Video players of the clips by subject; the clips are embedded in the page."""
    groups = [*report.prompted.items(), ("references", report.references)]
    groups += [(s.name, s.clips) for s in report.subjects]
    body = ""
    for name, clips in groups:
        if clips:
            players = "".join(_player(clip) for clip in clips)
            body += f"<h3>{html.escape(name)}</h3><div class=clips>{players}</div>"
    return f"<h2>Listen and look</h2>{body}" if body else ""


def _player(clip: Clip) -> str:
    data = base64.b64encode(clip.path.read_bytes()).decode()
    player = f'<video controls preload="metadata" src="data:video/mp4;base64,{data}"></video>'
    return f"<figure>{player}<figcaption>{html.escape(clip.caption)}</figcaption></figure>"


def _section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<h2>{title}</h2>{body}" if body else ""
