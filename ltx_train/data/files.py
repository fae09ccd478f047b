"""The files of a prepared folder, as readers see them: they ask for a path and open it.

Owns the protocol, and the case of a folder that is whole. `data.store` has the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ltx_train.contracts import DataError

SHARDS = "shards"


class UnusableShardError(DataError):
    """A shard whose bytes do not match the index in the store either. A run may train on the others."""


class Files(Protocol):
    """The files of a prepared folder by their names in it, as shards/NAME."""

    def path(self, name: str) -> Path:
        """The file on this machine. A store's file is fetched first; UnusableShardError, StoreError."""
        ...

    def place(self, name: str) -> Path:
        """Where the file is, or will be once it has been fetched."""
        ...

    def forget(self, name: str) -> bool:
        """Removes a file that was found damaged, where it can be had again. Returns whether it can."""
        ...

    def unusable(self) -> frozenset[str]:
        """Names of shards that are damaged in the store."""
        ...


class LocalFiles:
    """A prepared folder that is whole."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: str) -> Path:
        return self._root / name

    place = path

    def forget(self, name: str) -> bool:
        return False

    def unusable(self) -> frozenset[str]:
        return frozenset()
