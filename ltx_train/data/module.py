"""The Lightning data module: addressed batches out of a prepared folder."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from ltx_train.contracts import DataError, Sample
from ltx_train.data.collate import collate
from ltx_train.data.index import TRAIN, Index
from ltx_train.data.order import Address, MicroBatches, Order
from ltx_train.data.reader import Reader


class AddressedDataset(Dataset[Sample]):
    """Samples by address; the order lives in the batch sampler."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, address: Address) -> Sample:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._reader.sample(address)


class ShardData(LightningDataModule):
    """Training batches from optimizer step `first_step` on; held-out data is read by `evaluation`."""

    def __init__(
        self, reader: Reader, order: Order, *, micro_batch: int, first_step: int, last_step: int, workers: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self._reader, self._order, self._micro = reader, order, micro_batch
        self._first, self._last, self._workers = first_step, last_step, workers
        self._rank, self._world = rank, world

    def train_dataloader(self) -> DataLoader[Any]:
        batches = MicroBatches(
            self._order, micro_batch=self._micro, first_step=self._first, last_step=self._last, rank=self._rank,
            world=self._world,
        )  # fmt: skip
        return DataLoader(
            AddressedDataset(self._reader),
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=collate,
            num_workers=self._workers,
            worker_init_fn=_ignore_signals,
        )


def _ignore_signals(_worker: int) -> None:
    """Ctrl-C and a scheduler's notice reach the whole process group; only the training process may act on them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def training_order(index: Index, global_batch: int, seed: int) -> Order:
    """The order over the training split; DataError when it is empty."""
    buckets: dict[str, list[str]] = {}
    for record in index.split(TRAIN):
        buckets.setdefault(record.bucket, []).append(record.key)
    if not buckets:
        raise DataError("the training split is empty: lower data.heldout_speakers or add clips, then prepare again")
    return Order(buckets, global_batch, seed)
