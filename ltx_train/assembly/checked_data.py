"""Prepared data that passed the audit, for commands that must not run on bad data."""

from __future__ import annotations

from pathlib import Path

from ltx_train.assembly import from_config
from ltx_train.config import Config
from ltx_train.contracts import DataError
from ltx_train.data import audited, store
from ltx_train.data.audit import audit
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.united import PreparedFolder, unite

_SHOWN = 10


def open_checked(config: Config) -> tuple[Path, Index]:
    """The prepared folder and its index, with the folders of `data.also` in it.

    DataError with all errors of the audit that data.accept does not name. A folder that has passed is not read again
    until it changes. Of a store's folder the samples are checked when they are read: `ltx-train check` before the copy
    to the store checks them all.
    """
    root, index, stale = from_config.prepared(config)
    _refuse_bad(config, root, index, stale)
    further = from_config.further(config)
    for part, reasons in further:
        _refuse_bad(config, part.root, part.index, reasons)
    if not further:
        return root, index
    return root, unite(PreparedFolder(name="", root=root, index=index), [part for part, _ in further])


def _refuse_bad(config: Config, root: Path, index: Index, stale: list[str]) -> None:
    requirements = from_config.data_requirements(config)
    is_whole = store.settings_of(root) is None
    signature = audited.signature(root, requirements)
    if not stale and is_whole and audited.is_remembered(root, signature):
        return
    findings = [f for f in audit(root, index, requirements, stale, reads=is_whole) if f.error]
    errors = [f.text for f in findings if f.kind not in config.data.accept]
    if errors:
        more = f"\n  and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        listed = "\n  ".join(errors[:_SHOWN]) + more
        named = sorted({f.kind for f in findings if f.kind} - set(config.data.accept))
        mend = f"\n  to train in spite of it: data.accept=[{','.join(named)}]" if named else ""
        raise DataError(f"the data in {root} fail the check:\n  {listed}{mend}")
    if is_whole and not findings:
        audited.remember(root, signature)


def open_heldout(config: Config) -> tuple[Path, Index]:
    """The same, with a held-out split."""
    root, index = open_checked(config)
    if not index.split(HELDOUT):
        raise DataError(
            f"nothing is held out in {root}: set data.heldout_speakers (with one person data.heldout_clips=3), and "
            "prepare again"
        )
    return root, index
