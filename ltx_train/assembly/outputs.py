"""Files that a user names for a command's output: whose they are before they are replaced.

Owns the recognition of ltx-train's own files. Checked before any work, so that a wrong name costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ltx_train.config import Config
from ltx_train.contracts import ConfigError
from ltx_train.model.export import TRAINER
from ltx_train.sampling import media

# Bytes of a page in which its generator stands.
_HEAD = 1000


def check_output(config: Config, setting: str, value: str | None) -> None:
    """ConfigError when the setting names a folder, or an existing file that ltx-train did not write.

    `run.overwrite=true` permits the latter.
    """
    if value is None:
        return
    path = Path(value)
    if path.is_dir():
        raise ConfigError(f"{setting}={value} is a folder: name a file in it")
    if path.exists() and not config.run.overwrite and not _OWN[path.suffix](path):
        raise ConfigError(
            f"{setting}={value} exists and ltx-train did not write it: choose another name, or replace it with "
            f"run.overwrite=true"
        )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of bench.out; none when there is no file. ValueError when it holds something else."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not isinstance(records, list) or not all(isinstance(record, dict) and "case" in record for record in records):
        raise ValueError("not a list of records")
    return records


def _own_weights(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("trainer") == TRAINER
    except (SafetensorError, OSError):
        return False


def _own_records(path: Path) -> bool:
    try:
        return bool(read_records(path))
    except ValueError:
        return False


def _own_page(path: Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="ltx-train">' in file.read(_HEAD)


_OWN: dict[str, Callable[[Path], bool]] = {
    ".safetensors": _own_weights, ".mp4": media.is_own, ".json": _own_records,
    ".html": _own_page,
}  # fmt: skip
