"""Records by column: arrays that a million of them fit into, and that can be mapped from a file.

Owns the arrays' layout. Each distinct text is stored once; a record is made when it is read. It knows no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ltx_train.contracts import DataError
from ltx_train.data.record import Member, Record, shape
from ltx_train.diffusion.grid import audio_latents

Array = NDArray[Any]
# A record's fields by type. The types are texts: postponed evaluation of annotations.
_TEXTS, _FLOATS, _FLAGS = (
    tuple(field.name for field in fields(Record) if field.type == kind) for kind in ("str", "float", "bool")
)
# Names that are printed to terminals or joined to paths; a foreign folder's may hold escape sequences.
_SHOWN = ("key", "speaker", "recording", "shard", "source")
_MEASURED = "measured."


@dataclass(frozen=True, slots=True)
class Texts:
    """codes: (n,) number of each row's text. ends: (m,) where each distinct text ends in `data`, UTF-8."""

    codes: Array
    ends: Array
    data: Array

    @classmethod
    def of(cls, values: Iterable[str]) -> Texts:
        numbers: dict[str, int] = {}
        codes = [numbers.setdefault(value, len(numbers)) for value in values]
        encoded = [value.encode() for value in numbers]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.array(codes, np.uint32), ends, np.frombuffer(b"".join(encoded), np.uint8))

    @classmethod
    def read(cls, arrays: Mapping[str, Array], name: str) -> Texts:
        """ValueError when the arrays do not fit each other."""
        texts = cls(*(arrays[f"{name}.{part}"] for part in ("codes", "ends", "data")))
        last = int(texts.ends[-1]) if len(texts.ends) else 0
        out = len(texts.codes) and int(texts.codes.max()) >= len(texts.ends)
        if out or last != len(texts.data) or not _rises(texts.ends):
            raise ValueError(f"the texts of {name!r}")
        return texts

    def arrays(self, name: str) -> dict[str, Array]:
        return {f"{name}.codes": self.codes, f"{name}.ends": self.ends, f"{name}.data": self.data}

    def distinct(self, code: int) -> str:
        start = int(self.ends[code - 1]) if code else 0
        return self.data[start : int(self.ends[code])].tobytes().decode()

    def __getitem__(self, row: int) -> str:
        return self.distinct(int(self.codes[row]))


class Columns:
    """All records of an index. arrays: what `of` made, perhaps mapped from a file. ValueError, KeyError when they are
    none of records."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.texts = {name: Texts.read(arrays, name) for name in _TEXTS}
        self.numbers = {name: arrays[name] for name in (*_FLOATS, *_FLAGS)}
        self._measured = {n.removeprefix(_MEASURED): a for n, a in arrays.items() if n.startswith(_MEASURED)}
        self._variants, self._digests = Texts.read(arrays, "variants"), Texts.read(arrays, "members.sha256")
        self._variants_end, self._members_end = arrays["variants.rows"], arrays["members.rows"]
        self._offsets, self._sizes = arrays["members.offset"], arrays["members.size"]
        self.count = len(self._members_end)
        self._compare_lengths()

    @classmethod
    def of(cls, records: Sequence[Record]) -> Columns:
        arrays: dict[str, Array] = {}
        for name in _TEXTS:
            arrays |= Texts.of(getattr(record, name) for record in records).arrays(name)
        for name in _FLOATS:
            arrays[name] = np.array([getattr(record, name) for record in records], np.float64)
        for name in _FLAGS:
            arrays[name] = np.array([getattr(record, name) for record in records], np.bool_)
        for name in sorted({name for record in records for name in record.measured}):
            values = [record.measured.get(name, np.nan) for record in records]
            arrays[_MEASURED + name] = np.array(values, np.float64)
        members = [member for record in records for member in (record.tensors, *record.contexts)]
        arrays["members.rows"] = np.cumsum([1 + len(record.contexts) for record in records], dtype=np.int64)
        arrays["members.offset"] = np.array([member.offset for member in members], np.int64)
        arrays["members.size"] = np.array([member.size for member in members], np.int64)
        arrays |= Texts.of(member.sha256 for member in members).arrays("members.sha256")
        arrays["variants.rows"] = np.cumsum([len(record.variants) for record in records], dtype=np.int64)
        arrays |= Texts.of(text for record in records for text in record.variants).arrays("variants")
        return cls(arrays)

    def record(self, row: int) -> Record:
        """DataError for names that no release of this program writes."""
        try:
            texts = {name: column[row] for name, column in self.texts.items()}
            variants = tuple(self._variants[i] for i in _range(self._variants_end, row))
            tensors, *contexts = (self._member(i) for i in _range(self._members_end, row))
        except (UnicodeDecodeError, ValueError) as error:
            raise DataError(f"the index is damaged ({error}): prepare again") from error
        strange = [texts[name] for name in _SHOWN if not texts[name].isprintable()]
        if strange or "/" in texts["shard"]:
            raise DataError(f"the index holds the name {(strange or [texts['shard']])[0]!r}: prepare again")
        numbers = {name: self.numbers[name][row].item() for name in (*_FLOATS, *_FLAGS)}
        measured = {name: float(a[row]) for name, a in self._measured.items() if not np.isnan(a[row])}
        return Record(
            **texts, **numbers, measured=measured, variants=variants, tensors=tensors, contexts=tuple(contexts)
        )

    def _member(self, number: int) -> Member:
        return Member(int(self._offsets[number]), int(self._sizes[number]), self._digests[number])

    def _compare_lengths(self) -> None:
        rows = [*(t.codes for t in self.texts.values()), *self.numbers.values(), *self._measured.values()]
        members, variants = (int(ends[-1]) if self.count else 0 for ends in (self._members_end, self._variants_end))
        of_members = (self._offsets, self._sizes, self._digests.codes)
        if (
            any(len(column) != self.count for column in (*rows, self._variants_end))
            or any(len(column) != members for column in of_members)
            or len(self._variants.codes) != variants
            or not (_rises(self._members_end) and _rises(self._variants_end))
        ):
            raise ValueError("columns of different lengths")


class Rows(Sequence[Record]):
    """Records that are made when they are read. rows: where they are in the columns, in this order."""

    def __init__(self, columns: Columns, rows: Array | None = None) -> None:
        self.columns = columns
        self.rows: Array = np.arange(columns.count) if rows is None else rows

    @classmethod
    def of(cls, records: Sequence[Record]) -> Rows:
        return cls(Columns.of(records))

    def only(self, mask: Array) -> Rows:
        """The records where the mask, (n,), is true."""
        return Rows(self.columns, self.rows[mask])

    def where(self, name: str, text: str) -> Rows:
        """The records with this text in a field of few different texts."""
        return self.only(self.any_of(name, [text]))

    def like(self, name: str, row: int) -> Array:
        """(n,) whether a field has the text of that row of the columns."""
        codes = self.columns.texts[name].codes
        return codes[self.rows] == codes[row]

    def any_of(self, name: str, texts: Iterable[str]) -> Array:
        """(n,) whether a field has one of these texts."""
        column, wanted = self.columns.texts[name], {*texts}
        codes = [code for code in range(len(column.ends)) if column.distinct(code) in wanted] if wanted else []
        return np.isin(column.codes[self.rows], np.array(codes, column.codes.dtype))

    def shaped_like(self, row: int) -> Array:
        """(n,) whether a record has the shape of that row of the columns."""
        seconds = self.columns.numbers["seconds"]
        mine, length = self.numbers("seconds"), audio_latents(float(seconds[row]))
        alike = [value for value in np.unique(mine) if audio_latents(float(value)) == length]
        return self.like("bucket", row) & np.isin(mine, alike)

    def distinct(self, name: str) -> list[str]:
        """The different texts of a field."""
        column = self.columns.texts[name]
        return [column.distinct(int(code)) for code in np.unique(column.codes[self.rows])]

    def texts(self, name: str) -> Iterator[str]:
        """A text field of all records."""
        column = self.columns.texts[name]
        return (column[int(row)] for row in self.rows)

    def numbers(self, name: str) -> Array:
        """(n,) a field of numbers or flags."""
        return self.columns.numbers[name][self.rows]

    def grouped(self, name: str) -> dict[str, Rows]:
        """The records by a text field. Within a group they keep their order."""
        column = self.columns.texts[name]
        parts = _parted(column.codes[self.rows])
        return {column.distinct(int(code)): Rows(self.columns, self.rows[part]) for code, part in parts}

    def by_shape(self) -> dict[str, Rows]:
        """The records by `Record.shape`. Within a length they keep their order."""
        found: dict[str, list[Array]] = {}
        for bucket, rows in self.grouped("bucket").items():
            for seconds, part in _parted(rows.numbers("seconds")):
                found.setdefault(shape(bucket, float(seconds)), []).append(rows.rows[part])
        return {name: Rows(self.columns, np.concatenate(parts)) for name, parts in found.items()}

    def by_key(self) -> ByKey:
        return ByKey(self)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Record | Rows:
        if isinstance(index, slice):
            return Rows(self.columns, self.rows[index])
        return self.columns.record(int(self.rows[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and len(self) == len(other) and all(map(Record.__eq__, self, other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class ByKey(Mapping[str, Record]):
    """Records by key. row: where a key's record is in the columns."""

    def __init__(self, records: Rows) -> None:
        self._columns = records.columns
        self.row = dict(zip(records.texts("key"), records.rows.tolist(), strict=True))

    def __getitem__(self, key: str) -> Record:
        return self._columns.record(self.row[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


def _parted(values: Array) -> Iterator[tuple[Any, Array]]:
    """Each different value with the places, in rising order, where it stands."""
    order = np.argsort(values, kind="stable")
    firsts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0]) if len(values) else []
    for first, end in zip(firsts, [*firsts[1:], len(values)], strict=True):
        yield values[order[first]], order[first:end]


def _rises(ends: Array) -> bool:
    return not len(ends) or (int(ends[0]) >= 0 and bool((np.diff(ends) >= 0).all()))


def _range(ends: Array, row: int) -> range:
    return range(int(ends[row - 1]) if row else 0, int(ends[row]))
