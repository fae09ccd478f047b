"""Writes metrics to metrics.jsonl and to all sinks of the run.

Owns the metrics file and its continuation after an interruption. Knows the names and values of metrics, not how they
are computed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ltx_train import durable
from ltx_train.contracts import Clip
from ltx_train.training.tracking.sinks import Sink, Values


class Metrics:
    """Writes rows of named numbers per optimizer step to the file and to the sinks.

    Neither a full disk nor a tracker that fails ends a run: rows that could not be written are kept and written with
    the next ones.
    """

    def __init__(self, folder: Path, first_step: int, sinks: Sequence[Sink] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self._sinks, self._pending, self._warned = sinks, list[str](), set[str]()
        _drop_later_rows(path, first_step)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Values) -> None:
        """Writes a row at once, so that a killed run keeps it."""
        self._pending.append(durable.line({"step": step, **values}))
        self._write_pending()
        self._to_sinks(lambda sink: sink.write(step, values))

    def page(self, path: Path) -> None:
        """Passes a report page to the sinks."""
        self._to_sinks(lambda sink: sink.page(path))

    def media(self, step: int, clip: Clip) -> None:
        """Passes a generated clip to the sinks."""
        self._to_sinks(lambda sink: sink.media(step, clip))

    def close(self) -> None:
        self._write_pending()
        if self._pending:
            print(f"ltx-train: {len(self._pending)} rows of {self._file.name} could not be written", file=sys.stderr)
        self._file.close()
        self._to_sinks(lambda sink: sink.close())

    def _write_pending(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        data = memoryview("".join(self._pending).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)  # no half row stays
            self._warn(self._file.name, f"{error}; its rows are kept and written later")
            return
        self._pending.clear()

    def _to_sinks(self, call: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:
                self._warn(type(sink).__name__, f"{type(error).__name__}: {error}; the run goes on")

    def _warn(self, name: object, text: str) -> None:
        """Once for each file or tracker."""
        if str(name) not in self._warned:
            self._warned.add(str(name))
            print(f"ltx-train: {name} could not be written: {text}", file=sys.stderr)


def read_rows(path: Path) -> list[dict[str, float]]:
    """All whole rows of a metrics file."""
    return [row for row in durable.read_lines(path) if _is_row(row)]


def _is_row(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and all(isinstance(value, (int, float)) for value in row.values())


def _drop_later_rows(path: Path, step: int) -> None:
    """Removes the rows after `step`, whose steps the resumed run repeats, so that its curve has each step once."""
    text = "".join(durable.line(row) for row in read_rows(path) if row["step"] <= step)
    # Another process may be appending to the file (`evaluate` beside `fit`): it is replaced only where it must change.
    if path.is_file() and path.read_bytes() != text.encode():
        durable.write(path, text)
