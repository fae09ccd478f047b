"""Prepared data that passed the audit, for commands that must not run on bad data."""

from __future__ import annotations

from pathlib import Path

from ltx_train.assembly import from_config
from ltx_train.config import Config
from ltx_train.contracts import DataError
from ltx_train.data.audit import audit
from ltx_train.data.index import HELDOUT, Index

_SHOWN = 10


def open_checked(config: Config) -> tuple[Path, Index]:
    """The prepared folder and its index; DataError with all errors of the audit."""
    root, index, stale = from_config.prepared(config)
    findings = audit(root, index, from_config.data_requirements(config), stale)
    errors = [f.text for f in findings if f.error]
    if errors:
        more = f"\n  and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        listed = "\n  ".join(errors[:_SHOWN]) + more
        raise DataError(f"the data in {root} fail the check:\n  {listed}")
    return root, index


def open_heldout(config: Config) -> tuple[Path, Index]:
    """The same, with a held-out split."""
    root, index = open_checked(config)
    if not index.split(HELDOUT):
        raise DataError(
            f"nothing is held out in {root}: set data.heldout_speakers (with one person data.heldout_clips=3), and "
            "prepare again"
        )
    return root, index
