"""Where numbers go: metrics.jsonl always, and whatever sinks there are.

Owns the metrics file and its continuation after an interruption. Knows names and numbers, not how
they are made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ltx_train.training.tracking.sinks import Sink, Values


class Metrics:
    """Writes rows of named numbers per optimizer step, and hands them to the sinks."""

    def __init__(self, folder: Path, first_step: int, sinks: Sequence[Sink] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._sinks = folder / "metrics.jsonl", sinks
        _drop_later_rows(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        """One row; the file is flushed, so that a killed run keeps it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, values)

    def page(self, path: Path) -> None:
        """A report, for the sinks that show pages."""
        for sink in self._sinks:
            sink.page(path)

    def media(self, step: int, path: Path, caption: str) -> None:
        """A generated clip, for the sinks that show clips."""
        for sink in self._sinks:
            sink.media(step, path, caption)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """All rows of a metrics file; a last line cut by a crash is ignored."""
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _drop_later_rows(path: Path, step: int) -> None:
    """Removes rows of steps that will be done again, so that a continued curve has each step once."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= step]
    if path.is_file():
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
