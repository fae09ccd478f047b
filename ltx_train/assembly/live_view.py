"""A run as `watch` shows it: its page in parts that change one by one, and how it is going right now.

Owns what is shown and when it is drawn again. Reads the run's folder alone and writes nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from urllib.parse import quote

from ltx_train.assembly import run_page
from ltx_train.config import Config
from ltx_train.evaluation import history, kept, report
from ltx_train.evaluation.report import Report
from ltx_train.pages.render import render
from ltx_train.training.tracking.metrics import read_rows

CLIPS = "/clips/"
# Without a new row for this long, or for this many times the usual interval, a run has stopped or hangs.
_SILENT_S, _SILENT_TIMES = 60.0, 4.0
_METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """step, steps: done and to do. left_s: expected seconds to the end, None while the time of a step is not known.
    lines: more about the last row. silent: the run writes nothing although it should."""

    step: int
    steps: int
    left_s: float | None
    lines: Sequence[str]
    silent: bool


class LiveView:
    """Draws the page of a run's folder when its files have changed. Threads may share it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder, self._lock = config, folder, Lock()
        self._seen: tuple[object, ...] = ()
        self._parts: dict[str, str] = {}
        self._files: dict[str, Path] = {}

    def page(self) -> str:
        """The whole page. Its script fetches the parts every three seconds."""
        parts = self.parts()
        return render("watch.html.j2", title=f"{self._folder.parent.name}/{self._folder.name}", parts=parts)

    def parts(self) -> dict[str, str]:
        """HTML by the part's name: progress, clips, results."""
        with self._lock:
            seen = self._state()
            if seen != self._seen:
                shown = run_page.contents(self._config, self._folder)
                self._files = _served(shown, self._folder)
                urls = {path: url for url, path in self._files.items()}
                clips = report.groups(shown.clips, lambda path: urls[path])
                self._parts = {
                    "clips": render("players.html.j2", groups=clips),
                    "results": render("results.html.j2", **report.values(shown)),
                }
                self._seen = seen
            now = progress(self._config, self._folder, time.time())
            return {"progress": render("progress.html.j2", progress=now, left=_clock(now.left_s)), **self._parts}

    def file(self, url: str) -> Path | None:
        """The clip or poster behind a URL of the page; None for any other."""
        self.parts()
        return self._files.get(url)

    def _state(self) -> tuple[object, ...]:
        """Changes when a file that the page is made of does."""
        names = (_METRICS, history.NAME, kept.NAME, "samples/clips.json", "about.json")
        return tuple(_stamp(self._folder / name) for name in names)


def progress(config: Config, folder: Path, now: float) -> Progress:
    """How a run is going. now: seconds since the epoch."""
    rows = read_rows(folder / _METRICS)
    timed = [row for row in rows if "perf/step_s" in row]
    step, steps = max((int(row["step"]) for row in rows), default=0), config.optim.steps
    if not timed:
        return Progress(step=step, steps=steps, left_s=None, lines=["no step is logged yet"], silent=False)
    last = timed[-1]
    age = max(0.0, now - (folder / _METRICS).stat().st_mtime)
    usual = config.logger.every * last["perf/step_s"]
    silent = step < steps and age > max(_SILENT_S, _SILENT_TIMES * usual)
    lines = [f"loss {last['train/loss']:.4g}, {last['perf/step_s']:.3g} s a step, last row {age:.0f} s ago"]
    lines += _resources(last)
    if silent:
        lines.append(f"A row was due every {usual:.0f} s: the run measures, saves, hangs or has stopped.")
    left = (steps - step) * last["perf/step_s"]
    return Progress(step=step, steps=steps, left_s=left, lines=lines, silent=silent)


def _resources(row: Mapping[str, float]) -> list[str]:
    """Memory, and what steps wait for."""
    parts: list[str] = []
    if "mem/peak_gib" in row:
        error = f", {100 * row['mem/plan_error']:+.1f} % against the plan" if "mem/plan_error" in row else ""
        parts.append(f"peak {row['mem/peak_gib']:.1f} GiB{error}")
    waits = {"data": "perf/data_wait_s", "weights": "perf/stream_stall_s"}
    parts += [
        f"{row[name]:.2g} s of a step wait for {what}" for what, name in waits.items() if row.get(name, 0) > 0.001
    ]
    return [", ".join(parts)] if parts else []


def _served(shown: Report, folder: Path) -> dict[str, Path]:
    """The files of the page by URL. A changed file has another one, so that a browser fetches it again."""
    files: dict[str, Path] = {}
    for clip in (clip for clips in shown.clips.values() for clip in clips):
        for path in (clip.path, clip.poster):
            if path.is_file():
                name = quote(str(path.relative_to(folder / "samples")))
                files[f"{CLIPS}{hashlib.sha256(repr(_stamp(path)).encode()).hexdigest()[:12]}/{name}"] = path
    return files


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    except OSError:
        return None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left"
