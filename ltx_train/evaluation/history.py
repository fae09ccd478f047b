"""heldout.jsonl: the held-out loss of every identity at every measured step, for paired comparisons of steps.

Owns that file. One line per step: {"step": 250, "loss": {"anna": 0.41, ...}, "measured_on": 81...}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ltx_train import durable
from ltx_train.evaluation.rows import CORRECT, Row
from ltx_train.evaluation.statistics import Interval, by_identity

NAME = "heldout.jsonl"


@dataclass(frozen=True, slots=True)
class Measured:
    """One step's held-out loss by identity. on: what it was measured on (`evaluation.alike`)."""

    step: int
    loss: Mapping[str, float]
    on: int | None = None


def of_rows(step: int, rows: Iterable[Row]) -> Measured:
    """The mean loss of every identity over its rows of the correct arm."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.arm == CORRECT:
            values.setdefault(row.speaker, []).append(row.loss)
    return Measured(step, {speaker: sum(v) / len(v) for speaker, v in sorted(values.items())})


def read(folder: Path) -> list[Measured]:
    """All measured steps in order. The last line of a step counts; lines that are not valid JSON are skipped."""
    path = folder / NAME
    by_step: dict[int, Measured] = {}
    for raw in durable.read_lines(path):
        try:
            step, loss = int(raw["step"]), {str(who): float(value) for who, value in raw["loss"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged: this step's identities are lost, not the run
        on = raw.get("measured_on")
        by_step[step] = Measured(step, loss, on if isinstance(on, int) else None)
    return [by_step[step] for step in sorted(by_step)]


def record(folder: Path, measured: Measured) -> None:
    """Adds a step; drops later steps of an earlier attempt, since this attempt will measure them again."""
    earlier = [m for m in read(folder) if m.step < measured.step]
    lines = [durable.line({"step": m.step, "loss": dict(m.loss), "measured_on": m.on}) for m in (*earlier, measured)]
    durable.write(folder / NAME, "".join(lines))


def difference(first: Measured, second: Measured) -> Interval:
    """Interval of first - second over the identities that both steps measured."""
    shared = first.loss.keys() & second.loss.keys()
    return by_identity({speaker: [first.loss[speaker] - second.loss[speaker]] for speaker in sorted(shared)})
