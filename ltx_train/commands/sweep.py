"""`ltx-train sweep`: searches settings by held-out loss."""

from __future__ import annotations

from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.jobs.search import search


def run(config: Config) -> int:
    """Returns DONE when all trials are done, PREEMPTED when one was stopped; the same command then continues."""
    outcome = search(config)
    if outcome.code is Exit.DONE and outcome.best is not None:
        close(outcome.folder / "report.html", f"ltx-train evaluate {outcome.best}")
    return outcome.code
