"""How fast samples of a prepared folder are read, beside its shards as plain files: what `bench.what=data` runs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ltx_train import rng
from ltx_train.contracts import DataError
from ltx_train.data.files import SHARDS
from ltx_train.data.index import Index
from ltx_train.data.reader import Reader
from ltx_train.data.record import Record

# Enough for a steady rate, little enough for a minute on a slow disk.
_MOST_BYTES = 8 * 10**9
_BLOCK = 8 * 2**20


def measure(root: Path, index: Index, *, workers: int) -> dict[str, Any]:
    """Rates in MB (10^6 bytes) a second: `plain_mb_s` of shards from beginning to end, `samples_mb_s` of samples in a
    random order, each compared with its digest. Both from the disk: the pages of the shards are dropped before."""
    records = _chosen(index)
    shards = [root / SHARDS / name for name in sorted({record.shard for record in records})]
    plain = _plain(shards)
    _drop(shards)
    size = sum(record.tensors.size for record in records)
    started = time.perf_counter()
    read = sum(_loader(_Samples(Reader(root, index, seed=0), records), workers))
    seconds = time.perf_counter() - started
    assert read == size
    return {
        "samples": len(records), "sample_mb": round(size / len(records) / 1e6, 3), "workers": workers,
        "plain_mb_s": round(plain / 1e6, 1), "samples_mb_s": round(size / seconds / 1e6, 1),
        "ratio": round(size / seconds / plain, 3),
    }  # fmt: skip


def _chosen(index: Index) -> list[Record]:
    """Records in a random order, of at most 8 GB."""
    order = torch.randperm(len(index.records), generator=rng.generator(0, "bench/data")).tolist()
    chosen: list[Record] = []
    size = 0
    for number in order:
        size += index.records[number].tensors.size
        if chosen and size > _MOST_BYTES:
            break
        chosen.append(index.records[number])
    return chosen


def _plain(shards: Sequence[Path]) -> float:
    """Bytes a second."""
    _drop(shards)
    size, started = 0, time.perf_counter()
    for path in shards:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                size += len(block)
    return size / (time.perf_counter() - started)


def _drop(shards: Sequence[Path]) -> None:
    """Takes the shards out of the page cache, as far as the file system does that."""
    for path in shards:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


class _Samples(Dataset[int | DataError]):
    """Sizes of the samples that were read. An error travels as a value, as in `data.module`."""

    def __init__(self, reader: Reader, records: Sequence[Record]) -> None:
        self._reader, self._records = reader, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> int | DataError:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            self._reader.tensors(self._records[number])
        except DataError as error:
            return error
        return self._records[number].tensors.size


def _loader(samples: _Samples, workers: int) -> list[int]:
    """The sizes of all samples; DataError of the first that cannot be read."""
    found: list[int] = []
    for size in DataLoader(samples, batch_size=None, num_workers=workers):
        if isinstance(size, DataError):
            raise size
        found.append(int(size))
    return found
