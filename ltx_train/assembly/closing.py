"""The last lines of a command: the file it made, and the next command to type."""

from __future__ import annotations

from pathlib import Path


def close(made: Path | str | None, following: str) -> None:
    """made: the file or folder; None when the command made none."""
    if made is not None:
        print(f"made {made}")
    print(f"next: {following}")
