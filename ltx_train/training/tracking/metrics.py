"""Writes metrics to metrics.jsonl and to all sinks of the run.

Owns the metrics file and its continuation after an interruption. Knows the names and values of metrics, not how they
are computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ltx_train.training.tracking.sinks import Sink, Values


class Metrics:
    """Writes rows of named numbers per optimizer step to the file and to the sinks."""

    def __init__(self, folder: Path, first_step: int, sinks: Sequence[Sink] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._sinks = folder / "metrics.jsonl", sinks
        _drop_later_rows(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        """Writes a row and flushes the file, so that a killed run keeps the row."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, values)

    def page(self, path: Path) -> None:
        """Passes a report page to the sinks."""
        for sink in self._sinks:
            sink.page(path)

    def media(self, step: int, path: Path, caption: str) -> None:
        """Passes a generated clip to the sinks."""
        for sink in self._sinks:
            sink.media(step, path, caption)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """Reads all rows of a metrics file, without a last line that a crash has cut off."""
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _drop_later_rows(path: Path, step: int) -> None:
    """Removes the rows after `step`, whose steps the resumed run repeats, so that its curve has each step once."""
    text = "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step)
    # Another process may be appending to the file (`evaluate` beside `fit`): it is replaced only where it must change.
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
