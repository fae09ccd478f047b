"""Several prepared folders as one: their samples under one index, their files by one name.

A sample of a further folder has the key FOLDER:KEY, and its person and recording are called likewise: two folders may
call two people by one name, and a reference must never come from somebody else. The first folder's names stay as they
are, so a run without further folders draws the same samples as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ltx_train.contracts import DataError
from ltx_train.data.columns import Rows
from ltx_train.data.files import SHARDS, Files
from ltx_train.data.index import HELDOUT, TRAIN, Index
from ltx_train.data.record import Record
from ltx_train.data.store import files_of as files_of_folder

_BETWEEN = ":"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedFolder:
    """A prepared folder. name: what its samples are called after, empty for the first folder. weight: factor on how
    often an epoch uses each of its samples."""

    name: str
    root: Path
    index: Index
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UnitedIndex(Index):
    """The index of several folders."""

    parts: tuple[PreparedFolder, ...]


def unite(first: PreparedFolder, further: Sequence[PreparedFolder]) -> UnitedIndex:
    """One index of all parts, with the settings and encoders of the first.

    DataError for parts whose samples cannot be named apart, and for a clip that is trained on in one folder and held
    out in another.
    """
    parts = (first, *further)
    _refuse_names([part.name for part in further])
    _refuse_leaks(parts)
    same = {field.name: getattr(first.index, field.name) for field in fields(Index)}
    same["shards"] = tuple(replace(s, name=_named(p.name, s.name)) for p in parts for s in p.index.shards)
    same["records"] = Rows.of([_renamed(part, record) for part in parts for record in part.index.records])
    same["quarantined"] = {_named(p.name, k): why for p in parts for k, why in p.index.quarantined.items()}
    return UnitedIndex(**same, parts=parts)


def files_of(root: Path, index: Index) -> Files:
    """The files that an index names."""
    return UnitedFiles(index.parts) if isinstance(index, UnitedIndex) else files_of_folder(root, index)


class UnitedFiles:
    """`data.files.Files` of several folders: shards by FOLDER:NAME."""

    def __init__(self, parts: Sequence[PreparedFolder]) -> None:
        self._files = {part.name: files_of_folder(part.root, part.index) for part in parts}

    def path(self, name: str) -> Path:
        part, own = self._owner(name)
        return self._files[part].path(own)

    def place(self, name: str) -> Path:
        part, own = self._owner(name)
        return self._files[part].place(own)

    def forget(self, name: str) -> bool:
        part, own = self._owner(name)
        return self._files[part].forget(own)

    def unusable(self) -> frozenset[str]:
        return frozenset(_named(part, name) for part, files in self._files.items() for name in files.unusable())

    def _owner(self, name: str) -> tuple[str, str]:
        """The part that has a file, and the file's name in it."""
        part, between, own = name.removeprefix(f"{SHARDS}/").partition(_BETWEEN)
        return (part, f"{SHARDS}/{own}") if between and part in self._files else ("", name)


def _named(part: str, name: str) -> str:
    return f"{part}{_BETWEEN}{name}" if part else name


def _renamed(part: PreparedFolder, record: Record) -> Record:
    names = {field: _named(part.name, getattr(record, field)) for field in ("key", "speaker", "recording", "shard")}
    return replace(record, **names, weight=record.weight * part.weight)


def _refuse_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"two folders in data.also are called {name!r}: samples are named after them, so rename one"
            )
        if not name or _BETWEEN in name:
            raise DataError(f"a folder in data.also is called {name!r}: give it a name without {_BETWEEN!r}")


def _refuse_leaks(parts: Sequence[PreparedFolder]) -> None:
    """Clips that are trained on in one folder must not be held out in another."""
    for one in parts:
        trained = {record.source_sha256: record for record in one.index.split(TRAIN)}
        for other in parts:
            held = [r for r in other.index.split(HELDOUT) if r.source_sha256 in trained and other is not one]
            if held:
                clip = trained[held[0].source_sha256].key
                raise DataError(
                    f"{clip} of {one.root} is {held[0].key} of {other.root}, where it is held out ({len(held)} such "
                    "clips): the held-out loss would be of clips that are trained on; leave one of the folders out"
                )
