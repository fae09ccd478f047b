"""`ltx-train supervise`: keeps `fit` alive on a spot machine."""

from __future__ import annotations

from ltx_train.config import Config
from ltx_train.jobs import supervisor


def run(config: Config) -> int:
    """Returns the run's exit code: 75 when the cloud reclaims this machine; then run the same command on another."""
    return supervisor.supervise(config)
