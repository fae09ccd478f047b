"""Addressed order: the samples of an optimizer step as a pure function of (seed, step).

It knows sample keys, buckets and the global batch size, but no ranks, workers or history. A checkpoint
therefore stores one integer, and any number of ranks uses the same samples per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ltx_train import rng


@dataclass(frozen=True, slots=True)
class Address:
    """One use of a sample. `draw` is the global position of this use; it keys the random numbers of the sample."""

    key: str
    draw: int


class Order:
    """Training order: every epoch is a new permutation, cut into batches of one bucket each.

    A bucket's last batch is filled up with the first samples of its permutation, so each sample is used at least
    once per epoch. weights: how often an epoch uses a sample, 1 where none is given. Of a weight that is not whole,
    epochs take the whole number below or above in turn.
    """

    def __init__(
        self, buckets: Mapping[str, Sequence[str]], global_batch: int, seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self._buckets = {name: sorted(keys) for name, keys in sorted(buckets.items()) if keys}
        self._batch, self._seed, self._weights = global_batch, seed, weights or {}
        self.batches_per_epoch = sum(-(-self._uses(keys) // global_batch) for keys in self._buckets.values())
        self._epoch: tuple[int, list[list[str]]] = (-1, [])

    def batch(self, step: int) -> list[Address]:
        """Returns the addresses of the samples of optimizer step `step`, counted from 0."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        keys = self._epoch[1][position]
        return [Address(key, step * self._batch + slot) for slot, key in enumerate(keys)]

    def _batches(self, epoch: int) -> list[list[str]]:
        batches: list[list[str]] = []
        for name, members in self._buckets.items():
            keys = self._repeated(members, epoch)
            order = torch.randperm(len(keys), generator=rng.generator(self._seed, "order", name, epoch)).tolist()
            padding = -len(order) % self._batch
            order += [order[i % len(keys)] for i in range(padding)]
            shuffled = [keys[i] for i in order]
            batches += [shuffled[i : i + self._batch] for i in range(0, len(shuffled), self._batch)]
        permutation = torch.randperm(len(batches), generator=rng.generator(self._seed, "order/batches", "", epoch))
        return [batches[i] for i in permutation.tolist()]

    def _uses(self, keys: Sequence[str]) -> int:
        """Samples of an epoch in a bucket, the same in every epoch."""
        return max(1, round(sum(self._weights.get(key, 1.0) for key in keys)))

    def _repeated(self, keys: list[str], epoch: int) -> list[str]:
        """The keys as often as an epoch uses them."""
        weights = [self._weights.get(key, 1.0) for key in keys]
        if all(weight == 1 for weight in weights):
            return keys
        # Steps of a stair that rises by the weights: whole parts every time, fractions as often as they should be.
        heights = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        heights *= self._uses(keys) / float(heights[-1])
        heights[-1] = self._uses(keys)  # exactly: the number of an epoch's batches depends on it
        heights += float(rng.uniform(self._seed, "weights", "", epoch))
        stairs = heights.floor().long()
        counts = torch.diff(stairs, prepend=torch.zeros(1, dtype=torch.long))
        return [key for key, count in zip(keys, counts.tolist(), strict=True) for _ in range(count)]


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
