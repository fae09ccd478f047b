"""The Lightning data module: batches of addressed samples from a prepared folder."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from ltx_train import signals
from ltx_train.contracts import Batch, DataError, Sample, StoreError, UserError
from ltx_train.data.ahead import FetchAhead
from ltx_train.data.collate import collate
from ltx_train.data.columns import Rows
from ltx_train.data.files import LocalFiles, UnusableShardError
from ltx_train.data.index import TRAIN, Index
from ltx_train.data.order import Address, MicroBatches, Order, Shuffled, Streamed
from ltx_train.data.reader import Reader

# Tries to find a sample whose shards are usable; nearly always the first one is.
_STAND_INS = 8


class AddressedDataset(Dataset[Sample | UserError]):
    """Maps an address to its sample. The batch sampler determines the order.

    A sample that cannot be read is returned as its error: raised in a worker process, it would come out with torch's
    traceback around it. `Task` raises it. max_bad: share of the training samples that may be in unusable shards;
    another sample of the same shape takes their place.
    """

    def __init__(self, reader: Reader, max_bad: float = 0.0) -> None:
        self._reader, self._max_bad = reader, max_bad

    def __getitem__(self, address: Address) -> Sample | UserError:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return self._reader.sample(address)
        except UnusableShardError as error:
            return self._stand_in(address, error)
        except (DataError, StoreError) as error:
            return error

    def _stand_in(self, address: Address, error: UnusableShardError) -> Sample | UserError:
        """Another sample, or the error when too many samples are bad."""
        bad = self._reader.bad_share(address)
        if bad > self._max_bad:
            return DataError(
                f"{error}: {100 * bad:.1f} % of the samples are in such shards, and data.max_bad_fraction="
                f"{self._max_bad:g}: copy these shards to the store again, or raise it"
            )
        for attempt in range(_STAND_INS):
            other = self._reader.stand_in(address, attempt)
            if other is None:
                break
            with suppress(UnusableShardError):  # its reference may be in such a shard
                return self._reader.sample(other)
        return error


def _collated(samples: list[Sample | UserError]) -> Batch | UserError:
    """The batch, or the first error of its samples."""
    read = [sample for sample in samples if isinstance(sample, Sample)]
    if len(read) < len(samples):
        return next(sample for sample in samples if isinstance(sample, UserError))
    try:
        return collate(read)
    except DataError as error:
        return error


class ShardData(LightningDataModule):
    """Training batches for optimizer steps `first_step` to `last_step` - 1.

    `evaluation` reads the held-out split. max_bad: as of `AddressedDataset`. ahead: shards that are fetched ahead
    from a store.
    """

    def __init__(
        self, reader: Reader, order: Order, *, micro_batch: int, first_step: int, last_step: int, workers: int,
        rank: int = 0, world: int = 1, max_bad: float = 0.0, ahead: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._max_bad, self._ahead = max_bad, ahead
        self._reader, self._order, self._micro = reader, order, micro_batch
        self._first, self._last, self._workers = first_step, last_step, workers
        self._rank, self._world = rank, world

    def train_dataloader(self) -> DataLoader[Any]:
        batches = MicroBatches(
            self._order, micro_batch=self._micro, first_step=self._first, last_step=self._last, rank=self._rank,
            world=self._world,
        )  # fmt: skip
        fetched = batches
        if not isinstance(self._reader.files, LocalFiles):
            fetched = FetchAhead(batches, self._reader.files, self._reader.shards, most=self._ahead)
        return DataLoader(
            AddressedDataset(self._reader, self._max_bad),
            batch_sampler=fetched,  # pyright: ignore[reportArgumentType]
            collate_fn=_collated,
            num_workers=self._workers,
            worker_init_fn=_ignore_signals,
        )


def _ignore_signals(_worker: int) -> None:
    """Makes a worker ignore the signals of Ctrl-C and of a scheduler's notice.

    They reach the whole process group, but only the training process may act on them.
    """
    signals.ignore()


def training_order(
    index: Index, global_batch: int, seed: int, limit: int | None = None, *, window: int | None = None
) -> Order:
    """The order over the training split, or over its first `limit` clips; DataError when it is empty.

    window: samples of a lane that are shuffled when shards are read one after another; None: any sample at any time.
    """
    records = index.split(TRAIN)[:limit]
    if not len(records):
        raise DataError("the training split is empty: lower data.heldout_speakers or add clips, then prepare again")
    records = records.only(records.numbers("weight") != 0)
    if not len(records):
        raise DataError("all clips of the training split have the weight 0: give one of them another weight")
    groups: dict[str, Rows] = {}
    for bucket, clips in records.grouped("bucket").items():
        shapes = clips.by_shape()
        # The name keys the permutation: a bucket of one length keeps its own.
        groups |= {bucket if len(shapes) == 1 else shape: alike for shape, alike in shapes.items()}
    weighted = records.only(records.numbers("weight") != 1)
    weights = dict(zip(weighted.texts("key"), weighted.numbers("weight").tolist(), strict=True))
    keys = {name: list(rows.texts("key")) for name, rows in groups.items()}
    if window is None:
        return Shuffled(keys, global_batch, seed, weights)
    shards = {name: list(rows.texts("shard")) for name, rows in groups.items()}
    return Streamed(keys, shards, global_batch, seed, window=window, weights=weights)
