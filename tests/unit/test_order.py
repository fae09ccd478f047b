from __future__ import annotations

from collections import Counter

import pytest

from ltx_train.data.order import MicroBatches, Order

BUCKETS = {"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(3)]}


def test_a_step_is_a_pure_function() -> None:
    first, second = Order(BUCKETS, 4, 1), Order(BUCKETS, 4, 1)
    forwards = [first.batch(step) for step in range(20)]
    backwards = [second.batch(step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert [Order(BUCKETS, 4, 2).batch(step) for step in range(20)] != forwards


def test_each_epoch_uses_every_sample_and_one_bucket_per_batch() -> None:
    order = Order(BUCKETS, 4, 1)
    assert order.batches_per_epoch == 3
    for epoch in range(3):
        batches = [order.batch(epoch * 3 + i) for i in range(3)]
        assert {a.key for b in batches for a in b} == {k for keys in BUCKETS.values() for k in keys}
        assert all(len({a.key[0] for a in b}) == 1 and len(b) == 4 for b in batches)


def test_epochs_differ() -> None:
    order = Order({"a": [f"a{i}" for i in range(30)]}, 30, 1)
    assert order.batch(0) != order.batch(1)


def test_draws_are_unique_even_for_one_clip() -> None:
    order = Order({"a": ["only"]}, 4, 1)
    draws = [a.draw for step in range(5) for a in order.batch(step)]
    assert draws == list(range(20))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_share_a_global_batch(world: int) -> None:
    order = Order({"a": [f"a{i}" for i in range(12)]}, 4, 1)
    micro = 4 // world
    shares = [
        list(MicroBatches(order, micro_batch=micro, first_step=2, last_step=5, rank=rank, world=world))
        for rank in range(world)
    ]
    for place, step in enumerate(range(2, 5)):
        together = [address for share in shares for address in share[place]]
        assert together == order.batch(step)


def test_accumulation_cuts_the_same_batch() -> None:
    order = Order({"a": [f"a{i}" for i in range(12)]}, 6, 1)
    micro = list(MicroBatches(order, micro_batch=2, first_step=0, last_step=2))
    assert [len(m) for m in micro] == [2] * 6
    assert Counter(a.key for m in micro[:3] for a in m) == Counter(a.key for a in order.batch(0))
    assert len(MicroBatches(order, micro_batch=2, first_step=0, last_step=2)) == 6


def test_weights_are_uses_an_epoch() -> None:
    """Whole parts in every epoch and fractions in turn; every epoch has as many batches."""
    weights = {"a0": 3.0, "a1": 0.5, "a2": 1.25}
    order = Order({"a": ["a0", "a1", "a2", "a3"]}, 2, 1, weights)
    assert order.batches_per_epoch == 3
    epochs = 400
    used = [a.key for step in range(3 * epochs) for a in order.batch(step)]
    total = sum(weights.values()) + 1
    for key, weight in {**weights, "a3": 1.0}.items():
        assert used.count(key) / epochs == pytest.approx(6 / total * weight, rel=0.1)
    plain = Order({"a": ["a0", "a1", "a2", "a3"]}, 2, 1)
    assert [plain.batch(n) for n in range(9)] == [
        Order({"a": ["a0", "a1", "a2", "a3"]}, 2, 1, {"a0": 1.0}).batch(n) for n in range(9)
    ]
