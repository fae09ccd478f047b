"""Addressed order: the samples of an optimizer step as a pure function of (seed, step).

It knows sample keys, buckets and the global batch size, but no ranks, workers or history. A checkpoint
therefore stores one integer, and any number of ranks uses the same samples per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ltx_train import rng


@dataclass(frozen=True, slots=True)
class Address:
    """One use of a sample. `draw` is the global position of this use; it keys the random numbers of the sample."""

    key: str
    draw: int


class Order(Protocol):
    """The samples of optimizer step `step`, counted from 0."""

    def batch(self, step: int) -> list[Address]: ...


class Shuffled:
    """Every epoch is a new permutation of all samples, cut into batches of one bucket each.

    A bucket's last batch is filled up with the first samples of its permutation, so each sample is used at least
    once per epoch. weights: how often an epoch uses a sample, 1 where none is given. Of a weight that is not whole,
    epochs take the whole number below or above in turn.
    """

    def __init__(
        self, buckets: Mapping[str, Sequence[str]], global_batch: int, seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self._buckets = {name: sorted(keys) for name, keys in sorted(buckets.items()) if keys}
        self._epochs = _Epochs(self._buckets, global_batch, seed, weights or {})
        self.batches_per_epoch = self._epochs.batches

    def batch(self, step: int) -> list[Address]:
        return self._epochs.batch(step, self._arranged)

    def _arranged(self, epoch: int) -> list[list[str]]:
        batches: list[list[str]] = []
        size, seed = self._epochs.global_batch, self._epochs.seed
        for name, members in self._buckets.items():
            uses = self._epochs.uses(members, epoch)
            order = uses[torch.randperm(len(uses), generator=rng.generator(seed, "order", name, epoch))].tolist()
            order += [order[i % len(order)] for i in range(-len(order) % size)]
            shuffled = [members[i] for i in order]
            batches += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        permutation = torch.randperm(len(batches), generator=rng.generator(seed, "order/batches", "", epoch))
        return [batches[i] for i in permutation.tolist()]


class Streamed:
    """Shard after shard: for sets that are read from a store and are larger than the disk.

    Every epoch lines the shards up in a new order and cuts the line into one lane per slot of the global batch. A slot
    reads its lane from beginning to end; inside a lane, `window` samples at a time are shuffled. A rank has the same
    slots in every step, so each of W ranks reads 1 / W of the shards, and the samples of a step do not depend on W.
    shards: of each bucket's samples, in the order of `buckets`.
    """

    def __init__(
        self, buckets: Mapping[str, Sequence[str]], shards: Mapping[str, Sequence[str]], global_batch: int, seed: int,
        *, window: int, weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self._buckets = {name: list(keys) for name, keys in sorted(buckets.items()) if keys}
        numbers = {shard: number for number, shard in enumerate(sorted({s for of in shards.values() for s in of}))}
        self._shards = {name: torch.tensor([numbers[s] for s in shards[name]]) for name in self._buckets}
        self._shard_count, self._window = len(numbers), window
        self._epochs = _Epochs(self._buckets, global_batch, seed, weights or {})
        self.batches_per_epoch = self._epochs.batches

    def batch(self, step: int) -> list[Address]:
        return self._epochs.batch(step, self._arranged)

    def _arranged(self, epoch: int) -> list[list[str]]:
        stream = rng.generator(self._epochs.seed, "order/shards", "", epoch)
        line = torch.randperm(self._shard_count, generator=stream).argsort()  # the place of each shard
        placed: list[tuple[float, list[str]]] = []
        for name, members in self._buckets.items():
            uses = self._epochs.uses(members, epoch)
            lined = uses[line[self._shards[name][uses]].argsort(stable=True)]
            rows = self._lanes(lined, name, epoch).tolist()
            # Batches of all buckets advance together, so that the lanes of one shard are read at one time.
            placed += [((n + 0.5) / len(rows), [members[i] for i in row]) for n, row in enumerate(rows)]
        placed.sort(key=lambda pair: pair[0])
        return [keys for _, keys in placed]

    def _lanes(self, lined: Tensor, name: str, epoch: int) -> Tensor:
        """(batches, slots): each column is a lane of the line, shuffled a window at a time.

        Lanes differ by one sample at most; a shorter one ends with its last sample twice. With fewer samples than
        slots, lanes share samples.
        """
        count, slots = len(lined), self._epochs.global_batch
        edges = torch.arange(slots + 1) * count // slots
        lengths = (edges[1:] - edges[:-1]).clamp(min=1)
        places = edges[:-1].clamp(max=count - 1) + torch.arange(-(-count // slots))[:, None].clamp(max=lengths - 1)
        chance = torch.rand(places.shape, generator=rng.generator(self._epochs.seed, "order", name, epoch))
        windows = torch.arange(len(places))[:, None] // self._window
        return lined[places.gather(0, (windows + chance).argsort(0))]


class _Epochs:
    """What orders share: the number of batches in an epoch, and how often an epoch uses each sample."""

    def __init__(
        self, buckets: Mapping[str, Sequence[str]], global_batch: int, seed: int, weights: Mapping[str, float]
    ) -> None:
        self.global_batch, self.seed, self._weights = global_batch, seed, weights
        self.batches = sum(-(-self._count(keys) // global_batch) for keys in buckets.values())
        self._kept: tuple[int, list[list[str]]] = (-1, [])

    def batch(self, step: int, arranged: Callable[[int], list[list[str]]]) -> list[Address]:
        """The addresses of a step. arranged: makes the batches of an epoch; those of the last one are kept."""
        epoch, position = divmod(step, self.batches)
        if self._kept[0] != epoch:
            self._kept = (epoch, arranged(epoch))
        keys = self._kept[1][position]
        return [Address(key, step * self.global_batch + slot) for slot, key in enumerate(keys)]

    def uses(self, keys: Sequence[str], epoch: int) -> Tensor:
        """(n,) the place of each key, as often as the epoch uses it."""
        if not self._weights:
            return torch.arange(len(keys))
        # Steps of a stair that rises by the weights: whole parts every time, fractions as often as they should be.
        heights = torch.tensor([self._weights.get(key, 1.0) for key in keys], dtype=torch.float64).cumsum(0)
        heights *= self._count(keys) / float(heights[-1])
        heights[-1] = self._count(keys)  # exactly: the number of an epoch's batches depends on it
        heights += float(rng.uniform(self.seed, "weights", "", epoch))
        stairs = heights.floor().long()
        counts = torch.diff(stairs, prepend=torch.zeros(1, dtype=torch.long))
        return torch.arange(len(keys)).repeat_interleave(counts)

    def _count(self, keys: Sequence[str]) -> int:
        """Samples of an epoch in a bucket, the same in every epoch."""
        return max(1, round(sum(self._weights.get(key, 1.0) for key in keys))) if self._weights else len(keys)


class MicroBatches:
    """Batch sampler of one rank: yields the rank's part of every global batch in micro-batches.

    It covers the optimizer steps `first_step` to `last_step` - 1.
    """

    def __init__(
        self, order: Order, *, micro_batch: int, first_step: int, last_step: int, rank: int = 0, world: int = 1
    ) -> None:  # fmt: skip
        self._order, self._micro = order, micro_batch
        self._steps, self._rank, self._world = range(first_step, last_step), rank, world

    def __iter__(self) -> Iterator[list[Address]]:
        for step in self._steps:
            batch = self._order.batch(step)
            per_rank = len(batch) // self._world
            addresses = batch[self._rank * per_rank : (self._rank + 1) * per_rank]
            yield from (addresses[i : i + self._micro] for i in range(0, len(addresses), self._micro))

    def __len__(self) -> int:
        per_rank = len(self._order.batch(0)) // self._world
        return len(self._steps) * (per_rank // self._micro)
