"""report.html: what a run or several adapters do and do not do, in one file that needs no network.

Owns what stands on the page and in which order: clips, verdicts, figures, tables. `plots` draws the figures, the
templates of `pages` the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from ltx_train import durable
from ltx_train.contracts import Clip
from ltx_train.evaluation import plots
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.history import Measured, difference, of_rows
from ltx_train.evaluation.ranking import Entry, Ranking
from ltx_train.evaluation.rows import ARMS, BASE, CORRECT, OFF, WRONG, Grid, Row, gained, has, mean, paired
from ltx_train.evaluation.statistics import Interval
from ltx_train.evaluation.verdicts import Verdict
from ltx_train.pages.render import embedded, render
from ltx_train.pages.sections import Group, Player, Section, Table


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One measured adapter (or full weights). run, step: where it was saved; empty and None for a file from elsewhere.

    Names are distinct within a report. strengths: rows by the adapter's strength, empty where they were not measured.
    """

    name: str
    run: str = ""
    step: int | None
    rows: Sequence[Row]
    masses: Sequence[Mass] = ()
    strengths: Mapping[float, Sequence[Row]] = field(default_factory=dict[float, Sequence[Row]])


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of the page. clips: by title, what belongs together side by side. measured: held-out losses by step.
    subjects: the adapters just measured, best first; the first one gets all its figures. commands: what to do with the
    best step."""

    title: str
    facts: Mapping[str, str]
    metrics: Sequence[Mapping[str, float]]
    measured: Sequence[Measured] = ()
    subjects: Sequence[Subject]
    grid: Grid
    verdicts: Sequence[Verdict] = ()
    ranking: Ranking | None = None
    commands: Sequence[str] = ()
    clips: Mapping[str, Sequence[Clip]] = field(default_factory=dict[str, Sequence[Clip]])


def write(path: Path, report: Report) -> None:
    """Writes the page atomically."""
    durable.write(path, page(report))


def page(report: Report) -> str:
    """The page as HTML text, with its clips inside."""
    return render("run.html.j2", title=report.title, groups=groups(report.clips, embedded), **values(report))


def clips_page(report: Report) -> str:
    """The clips alone."""
    empty: dict[str, object] = {"report": report, "sections": []}
    return render("run.html.j2", title=report.title, groups=groups(report.clips, embedded), **empty)


def values(report: Report) -> dict[str, object]:
    """What the template `results` reads: everything but the clips."""
    return {"report": report, "sections": [section for section in _sections(report) if section is not None]}


def groups(titled: Mapping[str, Sequence[Clip]], url: Callable[[Path], str]) -> list[Group]:
    """The clips of a page by title. url: of a file."""
    return [
        Group(title, [Player(clip.caption, url(clip.path), _poster(clip, url)) for clip in clips])
        for title, clips in titled.items()
    ]


def _poster(clip: Clip, url: Callable[[Path], str]) -> str:
    return url(clip.poster) if clip.poster.is_file() else ""


def _sections(report: Report) -> list[Section | None]:
    found: list[Section | None] = []
    if len(report.subjects) > 1:
        found.append(_compared(report))
    found.append(_drawn("Curves", plots.curves(report.metrics, report.measured)))
    if report.ranking is not None and report.ranking.entries:
        found.append(_checkpoints(report.ranking, report.commands))
    found.append(Section(title="The run", tables=[Table(head=(), rows=list(report.facts.items()))]))
    if report.subjects and report.subjects[0].rows:
        found += _details(report.subjects[0], many=len(report.subjects) > 1)
    found.append(_drawn("Noise levels of training", plots.levels_of_training(report.metrics)))
    return found


def _drawn(title: str, *figures: Markup | None, note: str = "") -> Section | None:
    """A section of figures, None without any."""
    shown = [figure for figure in figures if figure is not None]
    return Section(title=title, figures=shown, note=note) if shown else None


def _details(subject: Subject, *, many: bool) -> list[Section | None]:
    """All sections about one subject; `many`: their titles name it."""
    rows = subject.rows
    suffix = f" of {subject.name}" if many else ""
    found: list[Section | None] = []
    if any(row.arm != CORRECT for row in rows):
        found.append(_drawn(f"What changes the loss{suffix}", plots.differences_by_level(rows)))
        found.append(_drawn("By identity", plots.differences_by_identity(rows)))
    found.append(_drawn("Held-out loss by noise level", plots.by_level(rows)))
    found.append(_drawn("By strength of the adapter", plots.by_strength(subject.strengths)))
    note = "Attention shows that the model reads the reference, not that it uses it."
    found.append(_drawn("Attention on the reference", plots.attention(subject.masses), note=note))
    return [*found, Section(title="Held-out loss in numbers", tables=[_table(rows)])]


def _compared(report: Report) -> Section:
    """Several adapters side by side: a table of paired differences, and curves by step, level and identity."""
    subjects = list(report.subjects)
    main = {s.name: [r for r in s.rows if r.sigma in report.grid.main] for s in subjects}
    best = of_rows(0, main[subjects[0].name])
    rows: list[Sequence[str]] = []
    for subject in subjects:
        own = main[subject.name]
        to_best = difference(of_rows(0, own), best).compared if subject is not subjects[0] else "the best"
        minus_base = str(paired(own, CORRECT, BASE)) if has(own, BASE) else ""
        gap = str(gained(own, WRONG)) if has(own, OFF[WRONG]) else ""
        rows.append((subject.name, mean(own, CORRECT).plain, to_best, minus_base, gap))
    by_step: dict[str, dict[int, Interval]] = {}
    for subject in sorted(subjects, key=lambda s: s.step or 0):
        if subject.step and has(main[subject.name], BASE):
            by_step.setdefault(subject.run, {})[subject.step] = paired(main[subject.name], CORRECT, BASE)
    figures = [plots.compared_by_step(by_step)] if any(len(steps) > 1 for steps in by_step.values()) else []
    figures += [plots.compared_by_level({s.name: s.rows for s in subjects}), plots.compared_by_identity(main)]
    head = ("adapter", "held-out loss", "minus the best, paired", "minus the base", "gained gap")
    shown = [figure for figure in figures if figure is not None]
    return Section(title="Compared", tables=[Table(head=head, rows=rows)], figures=shown)


def _checkpoints(ranking: Ranking, commands: Sequence[str]) -> Section:
    """The steps by held-out loss, the best one marked, and what was measured on something else apart."""
    head = ("step", "held-out loss, 95 %", "on minus off", "gained gap", "kept")
    tables = [Table(head=head, rows=[_cells(entry) for entry in ranking.entries], marked=0)]
    for described, entries in ranking.apart.items():
        title = f"{described}, not comparable with these:"
        tables.append(Table(head=head, rows=[_cells(entry) for entry in entries], title=title))
    note = "The marked step is the best; the commands below are for the best that is kept." if commands else ""
    return Section(title="Checkpoints", tables=tables, note=note, commands=commands)


def _cells(entry: Entry) -> list[str]:
    gap = "" if entry.gap is None else f"{entry.gap:+.4f}{'' if entry.gained else ' (with the base)'}"
    gain = "" if entry.gain is None else f"{entry.gain:+.4f}"
    kept = entry.kept.name if entry.kept else ""
    return [str(entry.step), Interval(entry.loss, entry.half, 0).plain, gain, gap, kept]


def _table(rows: Sequence[Row]) -> Table:
    arms = [arm for arm in ARMS if has(rows, arm)]
    cells = [
        [f"{sigma:g}", *(mean([r for r in rows if r.sigma == sigma], arm).plain for arm in arms)]
        for sigma in sorted({row.sigma for row in rows})
    ]
    return Table(head=("noise level", *(plots.TITLES[arm] for arm in arms)), rows=cells)
