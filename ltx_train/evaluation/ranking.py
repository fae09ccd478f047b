"""Which checkpoint to take: a run's measured steps by held-out loss, with intervals.

Owns the order and the link to the best one; reads rows of a metrics file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BEST = "best.safetensors"
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A measured step; half: half width of its 95 % interval over identities; kept: the file or folder that has it."""

    step: int
    loss: float
    half: float
    gap: float | None
    gain: float | None
    kept: Path | None


def ranked(rows: Sequence[Mapping[str, float]], folder: Path) -> list[Entry]:
    """Best first. A step that is measured twice counts as last measured."""
    found: dict[int, Entry] = {}
    for row in rows:
        if "val/loss" in row:
            step = int(row["step"])
            found[step] = Entry(
                step=step, loss=row["val/loss"], half=row.get("val/loss_ci95", float("nan")),
                gap=row.get("val/reference_gap"), gain=row.get("val/adapter_gain"), kept=_kept(folder, step),
            )  # fmt: skip
    return sorted(found.values(), key=lambda entry: entry.loss)


def table(entries: Sequence[Entry]) -> str:
    """The best few as text."""
    lines = ["checkpoints by held-out loss (95 % intervals over identities):"]
    for entry in entries[:_SHOWN]:
        gap = "" if entry.gap is None else f"  reference gap {entry.gap:+.4f}"
        gain = "" if entry.gain is None else f"  on minus off {entry.gain:+.4f}"
        lines.append(f"  step {entry.step:>6}  {entry.loss:.4f} ± {entry.half:.4f}{gain}{gap}  {entry.kept or 'gone'}")
    return "\n".join(lines)


def link(entries: Sequence[Entry], folder: Path) -> Path | None:
    """`adapters/best.safetensors` points to the best step's LoRA, if its file is there."""
    best = next((e for e in entries if e.kept is not None and e.kept.suffix == ".safetensors"), None)
    if best is None or best.kept is None:
        return None
    place = folder / "adapters" / BEST
    temporary = place.with_name(f"{BEST}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(best.kept.name)
    os.replace(temporary, place)
    return place


def _kept(folder: Path, step: int) -> Path | None:
    places = (folder / "adapters" / f"step-{step:06d}.safetensors", folder / "checkpoints" / f"step-{step:06d}")
    return next((place for place in places if place.exists()), None)
