"""evaluated.jsonl: the rows of a run's last evaluation, which its page is drawn from again when the run goes on.

Owns that file: one line with a checksum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from ltx_train import durable
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.rows import Grid, Row

NAME = "evaluated.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """likeness, by_clip: as in `verdicts.of_rows`. noise: of repeated measuring, by metric name (`rows.noise`).
    strengths: rows by the adapter's strength."""

    step: int
    rows: Sequence[Row]
    masses: Sequence[Mass]
    grid: Grid
    likeness: float | None
    by_clip: bool
    noise: Mapping[str, float] = field(default_factory=dict[str, float])
    strengths: Mapping[float, Sequence[Row]] = field(default_factory=dict[float, Sequence[Row]])


def record(folder: Path, evaluated: Evaluated) -> None:
    values = {
        "step": evaluated.step, "rows": [astuple(row) for row in evaluated.rows],
        "masses": [astuple(mass) for mass in evaluated.masses], "grid": astuple(evaluated.grid),
        "likeness": evaluated.likeness, "by_clip": evaluated.by_clip, "noise": dict(evaluated.noise),
        "strengths": [[s, [astuple(row) for row in rows]] for s, rows in evaluated.strengths.items()],
    }  # fmt: skip
    durable.write(folder / NAME, durable.line(values))


def read(folder: Path) -> Evaluated | None:
    """None where nothing was evaluated, or the file is damaged."""
    lines = durable.read_lines(folder / NAME)
    try:
        raw = lines[-1]
        return Evaluated(
            step=int(raw["step"]), rows=_rows(raw["rows"]), noise=raw["noise"],
            strengths={float(strength): _rows(rows) for strength, rows in raw["strengths"]},
            masses=[Mass(*mass) for mass in raw["masses"]], grid=Grid(*(tuple(levels) for levels in raw["grid"])),
            likeness=raw["likeness"], by_clip=bool(raw["by_clip"]),
        )  # fmt: skip
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _rows(values: Iterable[Sequence[Any]]) -> list[Row]:
    names = [field.name for field in fields(Row)]
    return [Row(**dict(zip(names, row, strict=True))) for row in values]
