"""Files that are whole or absent, also after a crash, a full disk or a power loss, and lines that are. Imports no
library.

The order of a write: temporary file in the same folder, fsync, rename over the old file, fsync of the folder. Before
the rename the old file is untouched; after it the new one is whole.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHECKSUM = "crc32"


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically. OSError leaves the old file, if any, and no temporary one."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def line(values: Mapping[str, Any]) -> str:
    """A line of a JSON-lines file, with a checksum as its last value."""
    return json.dumps({**values, _CHECKSUM: _checksum(values)}, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of all whole lines, without their checksums; nothing when there is no file.

    Damaged or cut lines are left out: a log must not bar the run that wrote it. Files of 0.1.0 and 0.2.0 have no
    checksums.
    """
    rows: list[tuple[dict[str, Any], int | None]] = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            values = json.loads(text)
            rows.append((values, values.pop(_CHECKSUM, None)))
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
    # Beside lines with a checksum, one without has a damaged one.
    is_checked = any(checksum is not None for _, checksum in rows)
    return [values for values, checksum in rows if not is_checked or checksum == _checksum(values)]


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, ensure_ascii=False).encode())


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
