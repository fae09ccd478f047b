"""report.html of a run, from the files of its folder alone: `fit` writes it while it trains, `evaluate` with the rows
that it has measured, `watch` shows it without writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ltx_train.assembly import run_clips, run_facts
from ltx_train.assembly.closing import sample_command
from ltx_train.assembly.heldout_measurement import course
from ltx_train.config import Config
from ltx_train.evaluation import history, kept, ranking, report, verdicts
from ltx_train.evaluation.kept import Evaluated
from ltx_train.evaluation.ranking import Ranking
from ltx_train.evaluation.report import Report, Subject
from ltx_train.evaluation.rows import Grid
from ltx_train.evaluation.verdicts import Verdict
from ltx_train.training.tracking.metrics import read_rows

NAME = "report.html"


def write(config: Config, folder: Path) -> Path:
    path = folder / NAME
    report.write(path, contents(config, folder))
    return path


def contents(config: Config, folder: Path) -> Report:
    """The page of a run at any time: with what it has measured and generated so far."""
    metrics = read_rows(folder / "metrics.jsonl")
    evaluated, listed = kept.read(folder), ranking.ranked(metrics, folder)
    subjects = [] if evaluated is None else [
        Subject(
            name=f"step {evaluated.step}", step=evaluated.step, rows=evaluated.rows, masses=evaluated.masses,
            strengths=evaluated.strengths,
        )
    ]  # fmt: skip
    return Report(
        title=f"{folder.parent.name}/{folder.name}", facts=run_facts.facts(config, folder, metrics), metrics=metrics,
        measured=history.read(folder), subjects=subjects, grid=evaluated.grid if evaluated else Grid((), ()),
        verdicts=_concluded(folder, evaluated, metrics), ranking=listed, commands=_commands(listed, folder),
        clips=run_clips.found(folder / "samples"),
    )  # fmt: skip


def conclusions(folder: Path) -> list[Verdict]:
    """Verdicts on the last evaluation, otherwise on the last measurement; and on the run's course."""
    return _concluded(folder, kept.read(folder), read_rows(folder / "metrics.jsonl"))


def _concluded(folder: Path, evaluated: Evaluated | None, metrics: Sequence[Mapping[str, float]]) -> list[Verdict]:
    if evaluated is not None:
        found = verdicts.of_rows(
            evaluated.rows, evaluated.grid, evaluated.likeness, by_clip=evaluated.by_clip, noise=evaluated.noise
        )
        return [*found, *course(folder)]
    measured = [row for row in metrics if "val/loss" in row]
    return [*course(folder), *verdicts.of_metrics(measured[-1] if measured else {})]


def _commands(listed: Ranking, folder: Path) -> list[str]:
    """Commands for the best step whose adapter is kept."""
    best = next((e for e in listed.entries if e.kept is not None and e.kept.suffix == ".safetensors"), None)
    if best is None:
        return []
    return [f"ltx-train export {folder} export.step={best.step}", sample_command(best.kept)]
