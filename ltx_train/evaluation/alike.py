"""What a measurement was made of, as a number beside its losses, so that only like is compared with like.

Owns the names of that number and of the sizes that people are shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

# A digest of 52 bits, which a float holds exactly: rows of metrics are numbers.
MEASURED_ON, CLIPS, LEVELS = "val/measured_on", "val/clips", "val/levels"
_BITS = 52
Row = TypeVar("Row", bound=Mapping[str, Any])


def number(parts: Any) -> int:
    """The digest of JSON values."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _BITS)


def of(row: Mapping[str, Any]) -> int | None:
    """None for rows of releases that did not record it: they are like each other."""
    return int(row[MEASURED_ON]) if MEASURED_ON in row else None


def main(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """What most of the steps were measured on; of equally many, what the last of them was."""
    steps: dict[int | None, set[int]] = {}
    last: dict[int | None, int] = {}
    for place, row in enumerate(rows):
        steps.setdefault(of(row), set()).add(int(row["step"]))
        last[of(row)] = place
    return max(steps, key=lambda on: (len(steps[on]), last[on]), default=None)


def only(rows: Sequence[Row], on: int | None) -> list[Row]:
    return [row for row in rows if of(row) == on]


def described(row: Mapping[str, Any]) -> str:
    """The sizes of a measurement."""
    if CLIPS not in row:
        return "measured on other clips or levels"
    return f"measured on {row[CLIPS]:.0f} clips x {row[LEVELS]:.0f} levels"
