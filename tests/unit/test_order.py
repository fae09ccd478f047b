from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from ltx_train.data.order import MicroBatches, Shuffled, Streamed

BUCKETS = {"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(3)]}


def test_a_step_is_a_pure_function() -> None:
    first, second = Shuffled(BUCKETS, 4, 1), Shuffled(BUCKETS, 4, 1)
    forwards = [first.batch(step) for step in range(20)]
    backwards = [second.batch(step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert [Shuffled(BUCKETS, 4, 2).batch(step) for step in range(20)] != forwards


def test_each_epoch_uses_every_sample_and_one_bucket_per_batch() -> None:
    order = Shuffled(BUCKETS, 4, 1)
    assert order.batches_per_epoch == 3
    for epoch in range(3):
        batches = [order.batch(epoch * 3 + i) for i in range(3)]
        assert {a.key for b in batches for a in b} == {k for keys in BUCKETS.values() for k in keys}
        assert all(len({a.key[0] for a in b}) == 1 and len(b) == 4 for b in batches)


def test_epochs_differ() -> None:
    order = Shuffled({"a": [f"a{i}" for i in range(30)]}, 30, 1)
    assert order.batch(0) != order.batch(1)


def test_draws_are_unique_even_for_one_clip() -> None:
    order = Shuffled({"a": ["only"]}, 4, 1)
    draws = [a.draw for step in range(5) for a in order.batch(step)]
    assert draws == list(range(20))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_share_a_global_batch(world: int) -> None:
    order = Shuffled({"a": [f"a{i}" for i in range(12)]}, 4, 1)
    micro = 4 // world
    shares = [
        list(MicroBatches(order, micro_batch=micro, first_step=2, last_step=5, rank=rank, world=world))
        for rank in range(world)
    ]
    for place, step in enumerate(range(2, 5)):
        together = [address for share in shares for address in share[place]]
        assert together == order.batch(step)


def test_accumulation_cuts_the_same_batch() -> None:
    order = Shuffled({"a": [f"a{i}" for i in range(12)]}, 6, 1)
    micro = list(MicroBatches(order, micro_batch=2, first_step=0, last_step=2))
    assert [len(m) for m in micro] == [2] * 6
    assert Counter(a.key for m in micro[:3] for a in m) == Counter(a.key for a in order.batch(0))
    assert len(MicroBatches(order, micro_batch=2, first_step=0, last_step=2)) == 6


def test_weights_are_uses_an_epoch() -> None:
    """Whole parts in every epoch and fractions in turn; every epoch has as many batches."""
    weights = {"a0": 3.0, "a1": 0.5, "a2": 1.25}
    order = Shuffled({"a": ["a0", "a1", "a2", "a3"]}, 2, 1, weights)
    assert order.batches_per_epoch == 3
    epochs = 400
    used = [a.key for step in range(3 * epochs) for a in order.batch(step)]
    total = sum(weights.values()) + 1
    for key, weight in {**weights, "a3": 1.0}.items():
        assert used.count(key) / epochs == pytest.approx(6 / total * weight, rel=0.1)
    plain = Shuffled({"a": ["a0", "a1", "a2", "a3"]}, 2, 1)
    assert [plain.batch(n) for n in range(9)] == [
        Shuffled({"a": ["a0", "a1", "a2", "a3"]}, 2, 1, {"a0": 1.0}).batch(n) for n in range(9)
    ]


def streamed(count: int, batch: int, *, per_shard: int = 10, window: int = 20, **more: Any) -> Streamed:
    """Two thirds of the samples in one bucket, one third in the other; shards hold both."""
    keys = [f"{number:05d}" for number in range(count)]
    buckets = {"wide": [k for k in keys if int(k) % 3], "tall": [k for k in keys if not int(k) % 3]}
    shards = {name: [shard_of(key, per_shard) for key in of] for name, of in buckets.items()}
    return Streamed(buckets, shards, batch, 7, window=window, **more)


def shard_of(key: str, per_shard: int = 10) -> str:
    return f"shard-{int(key) // per_shard}"


def epoch(order: Streamed, number: int = 0) -> list[list[str]]:
    first = number * order.batches_per_epoch
    return [[a.key for a in order.batch(step)] for step in range(first, first + order.batches_per_epoch)]


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (2, 8), (5, 8), (100, 1), (100, 7), (1200, 8)])
def test_a_stream_uses_every_sample_in_batches_of_one_bucket(count: int, batch: int) -> None:
    order = streamed(count, batch)
    for number in range(2):
        batches = epoch(order, number)
        uses = Counter(key for keys in batches for key in keys)
        assert set(uses) == {f"{n:05d}" for n in range(count)}
        assert all(len({int(key) % 3 == 0 for key in keys}) == 1 and len(keys) == batch for keys in batches)
        if count > 10 * batch:
            assert max(uses.values()) <= 2
            assert sum(n - 1 for n in uses.values()) <= 2 * batch


def test_a_stream_is_a_pure_function_of_the_step() -> None:
    steps = [0, 511, 3, 44, 17]
    assert [streamed(400, 4).batch(step) for step in steps] == [streamed(400, 4).batch(step) for step in steps]
    assert epoch(streamed(400, 4), 0) != epoch(streamed(400, 4), 1)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_of_a_stream_share_the_shards_out(world: int) -> None:
    """Of 120 shards each rank reads its part and those on its edges, a few at a time, and none again."""
    order = streamed(1200, 8)
    for rank in range(world):
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        read = [{shard_of(key) for key in keys[share]} for keys in epoch(order)]
        # Two buckets, each with its own edges of lanes.
        assert len(set().union(*read)) <= 120 / world + 2 * 2 * 8 / world
        seen: dict[str, list[int]] = {}
        for step, shards in enumerate(read):
            for shard in shards:
                seen.setdefault(shard, []).append(step)
        spans = sorted(steps[-1] - steps[0] for steps in seen.values())
        # A lane has 100 samples of the wide bucket, and shuffles 20 at a time: 20 of its 100 batches.
        assert spans[len(spans) // 2] <= 0.45 * len(read)


def test_a_larger_window_shuffles_more() -> None:
    """A window of one sample leaves each lane in the order of its shards."""
    lane = [keys[0] for keys in epoch(streamed(1200, 4, window=1)) if int(keys[0]) % 3]
    shards = [shard_of(key) for key in lane]
    assert len([1 for a, b in pairwise(shards) if a != b]) == len(set(shards)) - 1
    mixed = [shard_of(keys[0]) for keys in epoch(streamed(1200, 4, window=1000)) if int(keys[0]) % 3]
    assert len([1 for a, b in pairwise(mixed) if a != b]) > 3 * len(set(mixed))


def test_a_stream_uses_samples_by_their_weights() -> None:
    order = streamed(600, 4, weights={f"{n:05d}": 2.5 for n in range(300)})
    uses = Counter(key for number in range(4) for keys in epoch(order, number) for key in keys)
    assert sum(n for key, n in uses.items() if int(key) < 300) / (4 * 300) == pytest.approx(2.5, rel=0.03)
    assert sum(n for key, n in uses.items() if int(key) >= 300) / (4 * 300) == pytest.approx(1.0, rel=0.03)
