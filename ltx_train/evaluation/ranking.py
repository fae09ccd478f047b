"""Choice of a checkpoint: a run's measured steps by held-out loss, with intervals.

Owns the ranking and the link to the best adapter; reads rows of a metrics file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltx_train.evaluation import alike
from ltx_train.evaluation.statistics import Interval

BEST = "best.safetensors"
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A measured step.

    half: half the width of the 95 % interval of the loss over identities, nan for one. gap: the gained gap, or the
    reference gap where the base was not measured (gained: which of the two). gain: adapter gain.
    kept: the step's adapter file or checkpoint folder, None if neither exists any more.
    """

    step: int
    loss: float
    half: float
    gap: float | None
    gained: bool
    gain: float | None
    kept: Path | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """entries: the steps of one measurement, lowest held-out loss first. apart: steps that were measured on something
    else, each measurement with its description; their losses do not compare with the entries' or each other's."""

    entries: Sequence[Entry]
    apart: Mapping[str, Sequence[Entry]]


def ranked(rows: Sequence[Mapping[str, float]], folder: Path) -> Ranking:
    """The measured steps. The last row of a step counts. Entries are of the measurement that most steps have."""
    measured = [row for row in rows if "val/loss" in row]
    on = alike.main(measured)
    apart: dict[str, list[Entry]] = {}
    for other in dict.fromkeys(alike.of(row) for row in measured):
        if other != on:
            some = alike.only(measured, other)
            apart.setdefault(alike.described(some[-1]), []).extend(_entries(some, folder))
    return Ranking(_entries(alike.only(measured, on), folder), apart)


def _entries(rows: Sequence[Mapping[str, float]], folder: Path) -> list[Entry]:
    entries: dict[int, Entry] = {}
    for row in rows:
        step = int(row["step"])
        entries[step] = Entry(
            step=step, loss=row["val/loss"], half=row.get("val/loss_ci95", float("nan")),
            gap=row.get("val/gained_gap", row.get("val/reference_gap")), gained="val/gained_gap" in row,
            gain=row.get("val/adapter_gain"), kept=_kept(folder, step),
        )  # fmt: skip
    return sorted(entries.values(), key=lambda entry: entry.loss)


def table(ranking: Ranking) -> str:
    """The best entries as text, at most eight, and those of other measurements apart."""
    lines = ["checkpoints by held-out loss (95 % intervals over identities):"]
    lines += [_line(entry) for entry in ranking.entries[:_SHOWN]]
    for described, entries in ranking.apart.items():
        lines += [f"{described}, not comparable with these:", *(_line(entry) for entry in entries[:_SHOWN])]
    return "\n".join(lines)


def _line(entry: Entry) -> str:
    gap = "" if entry.gap is None else f"  {'gained' if entry.gained else 'reference'} gap {entry.gap:+.4f}"
    gain = "" if entry.gain is None else f"  on minus off {entry.gain:+.4f}"
    loss = Interval(entry.loss, entry.half, 0).plain
    return f"  step {entry.step:>6}  {loss}{gain}{gap}  {entry.kept or 'not kept'}"


def link(ranking: Ranking, folder: Path) -> Path | None:
    """Links `adapters/best.safetensors` to the best adapter file that exists; the link's path, None without one."""
    best = next((e for e in ranking.entries if e.kept is not None and e.kept.suffix == ".safetensors"), None)
    if best is None or best.kept is None:
        return None
    path = folder / "adapters" / BEST
    temporary = path.with_name(f"{BEST}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(best.kept.name)
    os.replace(temporary, path)
    return path


def _kept(folder: Path, step: int) -> Path | None:
    candidates = (folder / "adapters" / f"step-{step:06d}.safetensors", folder / "checkpoints" / f"step-{step:06d}")
    return next((path for path in candidates if path.exists()), None)
