"""`ltx-train supervise`: keeps `fit` alive on a spot machine."""

from __future__ import annotations

from ltx_train.config import Config
from ltx_train.jobs import supervisor


def run(config: Config) -> int:
    """The run's exit code; 75 when this machine has to go, and the same command continues on another."""
    return supervisor.supervise(config)
