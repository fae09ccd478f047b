"""The manifest of a checkpoint: its files with sizes and digests. Writing it last commits the checkpoint.

Owns its form and everything that reads it. A manifest may come from an object store that others can write to, so it is
checked before it is used: a name is a plain file name, and a checkpoint without state or weights does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.updates import slice_files

SCHEMA = 1
NAME = "manifest.json"
STATE, WEIGHTS = "state.json", "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a checkpoint: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


def entry(path: Path) -> Entry:
    return Entry(path.stat().st_size, _sha256(path))


def write(folder: Path, known: Mapping[str, Entry]) -> None:
    """Flushes the folder's files and lists them. known: entries of files that other ranks have flushed."""
    files = dict(known)
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            durable.sync(path)
            files[path.name] = entry(path)
    listed = {name: asdict(item) for name, item in files.items()}
    durable.write(folder / NAME, json.dumps({"schema": SCHEMA, "sha256": _digest(listed), "files": listed}, indent=1))


def parse(text: str | bytes, where: object) -> Mapping[str, Entry]:
    """The files of a checkpoint. DataError when the manifest is damaged, incomplete or from another release."""
    try:
        raw = json.loads(text)
        schema, listed = raw["schema"], raw["files"]
        files = {name: Entry(int(item["size"]), str(item["sha256"])) for name, item in listed.items()}
        # Manifests of 0.1.0 and 0.2.0 have no digest of their own.
        is_damaged = "sha256" in raw and raw["sha256"] != _digest(listed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise DataError(f"{where} was written by another release (schema {schema}, this one reads {SCHEMA})")
    if is_damaged:
        raise DataError(f"{where} is damaged: its content does not match its digest")
    strange = [name for name in files if name in ("", ".", "..", NAME) or "/" in name or "\\" in name or "\0" in name]
    if strange:
        raise DataError(f"{where} names a file outside its folder: {strange[0]!r}")
    if STATE not in files or not ({WEIGHTS, slice_files.LAYOUT} & files.keys()):
        raise DataError(f"{where} lists no state or no weights: it is not a checkpoint")
    return files


def read(folder: Path) -> Mapping[str, Entry]:
    """As `parse`, of a folder's manifest."""
    try:
        return parse((folder / NAME).read_bytes(), folder / NAME)
    except OSError as error:
        raise DataError(f"{folder / NAME} cannot be read ({error})") from error


def is_complete(folder: Path) -> bool:
    """Whether all listed files are there in their size. `verify` compares the bytes too."""
    try:
        files = read(folder)
        return all((folder / name).stat().st_size == item.size for name, item in files.items())
    except (OSError, DataError):
        return False


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compares the digests of a checkpoint's files with its manifest; DataError names the file that differs.

    part, parts: check every `parts`-th file, starting with number `part`.
    """
    for name, item in list(read(folder).items())[part::parts]:
        try:
            is_whole = _sha256(folder / name) == item.sha256
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read ({error})") from error
        if not is_whole:
            raise DataError(
                f"{folder / name} or its manifest is damaged: remove {folder} to continue from the checkpoint before it"
            )


def _digest(listed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
