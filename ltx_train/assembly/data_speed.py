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
# Samples that each worker reads ahead.
_PREFETCH = 2


def measure(root: Path, index: Index, *, workers: int) -> dict[str, Any]:
    """Rates in MB (10^6 bytes) a second: `plain_mb_s` of shards from beginning to end, `samples_mb_s` of samples in a
    random order, each compared with its digest. Both from the disk: the pages of the shards are dropped before."""
    records = _chosen(index)
    shards = [root / SHARDS / name for name in sorted({record.shard for record in records})]
    plain = _plain(shards)
    _drop(shards)
    size = sum(record.tensors.size for record in records)
    counted, seconds = _read(_Samples(Reader(root, index, seed=0), records), workers)
    return {
        "samples": len(records), "sample_mb": round(size / len(records) / 1e6, 3), "workers": workers,
        "plain_mb_s": round(plain / 1e6, 1), "samples_mb_s": round(counted / seconds / 1e6, 1),
        "ratio": round(counted / seconds / plain, 3),
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


def _read(samples: _Samples, workers: int) -> tuple[int, float]:
    """Bytes and seconds of reading, once it runs; DataError of the first sample that cannot be read.

    The start of the workers takes longer than many samples. What they have read ahead by the first sample does not
    count either; of a few samples all count, and the start with them.
    """
    ahead = workers * _PREFETCH + 1
    ahead = ahead if len(samples) > 4 * ahead else 0
    started, size = time.perf_counter(), 0
    prefetched = _PREFETCH if workers else None
    loader = DataLoader(samples, batch_size=None, num_workers=workers, prefetch_factor=prefetched)
    for number, found in enumerate(loader):
        if isinstance(found, DataError):
            raise found
        if number + 1 == ahead:
            started = time.perf_counter()
        size += int(found) if number >= ahead else 0
    return size, time.perf_counter() - started
