"""Packs encoded items and text contexts into WebDataset tar shards, and addresses their bytes for the index.

Owns the shard layout: each sample has the members `<key>.safetensors` and `<key>.json`. A text context is the member
`contexts/<digest>.safetensors`, in front of the first sample of the shard that uses it. Samples are sorted and file
times are fixed, so equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from webdataset.writer import TarWriter

from ltx_train.data.index import Shard
from ltx_train.data.record import Member, Record

CONTEXT = "contexts/"
_TENSORS, _FACTS = "safetensors", "json"


@dataclass(frozen=True, slots=True)
class Sources:
    """The bytes that go into shards. item: a record's tensors. context: a text context by its digest. dropped: the
    digest of the dropped caption's context."""

    item: Callable[[Record], bytes]
    context: Callable[[str], bytes]
    dropped: str


def write_shards(
    records: Iterable[Record], sources: Sources, folder: Path, per_shard: int
) -> tuple[list[Shard], list[Record]]:
    """Writes the shards of every split. Returns the shards, and the records with the location of their bytes.

    A shard's name contains a digest of its content, so readers of an older index keep reading the older files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    placed: list[Record] = []
    by_split: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: r.key):
        by_split.setdefault(record.split, []).append(record)
    for split, members in sorted(by_split.items()):
        for number in range(0, len(members), per_shard):
            stem = f"{split}-{number // per_shard:06d}"
            shard, packed = _write_shard(members[number : number + per_shard], sources, folder, stem)
            shards.append(shard)
            placed += packed
    return shards, placed


def prune(folder: Path, keep: Sequence[Shard]) -> None:
    """Removes shards that are not in `keep`, the shards of the written index."""
    names = {shard.name for shard in keep}
    for path in folder.glob("*.tar*"):
        if path.name not in names:
            path.unlink()


def _write_shard(
    records: Sequence[Record], sources: Sources, folder: Path, stem: str
) -> tuple[Shard, list[Record]]:  # fmt: skip
    temporary = folder / f"{stem}.tar.tmp-{os.getpid()}"
    with temporary.open("wb") as file:
        placed = _write(file, records, sources)
        file.flush()
        os.fsync(file.fileno())
    digest, size = _digest(temporary)
    name = f"{stem}-{digest[:8]}.tar"
    os.replace(temporary, folder / name)
    return Shard(name, size, digest, len(placed)), [replace(record, shard=name) for record in placed]


def _write(file: BinaryIO, records: Sequence[Record], sources: Sources) -> list[Record]:
    placed: list[Record] = []
    contexts: dict[str, Member] = {}
    with TarWriter(file, encoder=False, mtime=0) as tar:
        for record in records:
            digests = (record.context, *record.variants, sources.dropped)
            for digest in digests:
                if digest not in contexts:
                    contexts[digest] = _add(tar, CONTEXT + digest, _TENSORS, sources.context(digest))
            tensors = _add(tar, record.key, _TENSORS, sources.item(record))
            _add(tar, record.key, _FACTS, _sidecar(record))
            placed.append(replace(record, tensors=tensors, contexts=tuple(contexts[digest] for digest in digests)))
    return placed


def _add(tar: TarWriter, key: str, kind: str, data: bytes) -> Member:
    """Appends a member and returns its place. The tar ends with the member's data, filled up to a whole block."""
    tar.write({"__key__": key, kind: data})
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return Member(tar.tarstream.offset - padded, len(data), hashlib.sha256(data).hexdigest())


def _sidecar(record: Record) -> bytes:
    values = asdict(record)
    for name in ("shard", "tensors", "contexts"):
        del values[name]
    return json.dumps(values, sort_keys=True, ensure_ascii=False).encode()


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
