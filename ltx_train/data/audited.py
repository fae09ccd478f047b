"""Remembers which prepared folders passed the audit, so that a run starts without reading every byte again.

Owns `audited.json` beside the index. A folder is known by the bytes of its index, by sizes and times of its shards,
and by what the run needs of it: any difference means a new audit. Every sample's digest is checked when it is read in
any case; what is remembered saves time at the start and vouches for no byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ltx_train import durable
from ltx_train.data.audit import DataRequirements
from ltx_train.data.files import SHARDS
from ltx_train.data.index import INDEX_NAME

NAME = "audited.json"
# A change of the audit makes what earlier releases remembered worthless.
_FORMAT = 1
# Modes of one folder that are remembered together.
_KEPT = 16


def signature(root: Path, requirements: DataRequirements) -> str:
    """What an audit's result depends on, as a digest. The folder has an index."""
    with (root / INDEX_NAME).open("rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    files = [
        f"{path.name}:{status.st_size}:{status.st_mtime_ns}"
        for path in sorted((root / SHARDS).glob("*"))
        for status in (path.stat(),)
    ]
    text = json.dumps([_FORMAT, index, files, _plain(requirements)])
    return hashlib.sha256(text.encode()).hexdigest()


def is_remembered(root: Path, found: str) -> bool:
    """Whether a folder of this signature has passed."""
    return found in _signatures(root)


def remember(root: Path, found: str) -> None:
    """Keeps the signature of a folder that has passed. A folder that nobody may write to is audited every time."""
    kept = [*(s for s in _signatures(root) if s != found), found][-_KEPT:]
    try:
        durable.write(root / NAME, json.dumps({"passed": kept}) + "\n")
    except OSError:
        return


def _signatures(root: Path) -> list[str]:
    """Empty where the file is missing or damaged: then the folder is audited."""
    try:
        passed: Any = json.loads((root / NAME).read_text(encoding="utf-8"))["passed"]
        return [str(text) for text in passed] if isinstance(passed, list) else []
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _plain(value: Any) -> Any:
    """A value of plain JSON types; sets in a fixed order."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (set, frozenset)):
        return sorted(str(entry) for entry in value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return str(value)
