"""Packs encoded items into WebDataset tar shards, and addresses their bytes for the index.

Owns the shard layout: each sample has one `<key>.safetensors` and one `<key>.json` member. Keys are
sorted and file times are fixed, so equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ltx_train.data.index import Member, Record, Shard

ReadItem = Callable[[Record], bytes]


def write_shards(
    records: Iterable[Record], read_item: ReadItem, folder: Path, per_shard: int
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
            shard, packed = _write_shard(
                members[number : number + per_shard], read_item, folder, split, number // per_shard
            )
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
    records: Sequence[Record], read_item: ReadItem, folder: Path, split: str, number: int
) -> tuple[Shard, list[Record]]:
    temporary = folder / f"{split}-{number:06d}.tar.tmp-{os.getpid()}"
    placed: list[Record] = []
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            data = read_item(record)
            offset = _add(tar, f"{record.key}.safetensors", data)
            member = Member(offset, len(data), hashlib.sha256(data).hexdigest())
            _add(tar, f"{record.key}.json", _sidecar(record))
            placed.append(replace(record, tensors=member))
    digest, size = _digest(temporary)
    name = f"{split}-{number:06d}-{digest[:8]}.tar"
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / name)
    return Shard(name, size, digest, len(placed)), [replace(record, shard=name) for record in placed]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member and returns the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded


def _sidecar(record: Record) -> bytes:
    values = asdict(record)
    for name in ("shard", "tensors"):
        del values[name]
    return json.dumps(values, sort_keys=True, ensure_ascii=False).encode()


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
