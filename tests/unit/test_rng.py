from __future__ import annotations

import torch

from ltx_train import rng


def test_equal_keys_give_equal_numbers() -> None:
    assert torch.equal(rng.normal((4,), 1, "noise", "clip", 7), rng.normal((4,), 1, "noise", "clip", 7))


def test_every_part_of_the_key_matters() -> None:
    keys = [(1, "a", "k", 0), (2, "a", "k", 0), (1, "b", "k", 0), (1, "a", "l", 0), (1, "a", "k", 1), (1, "a", "", 0)]
    assert len({rng.key_seed(*key) for key in keys}) == len(keys)


def test_parts_cannot_be_confused() -> None:
    assert rng.key_seed(1, "a", "b1", 2) != rng.key_seed(1, "a", "b", 12)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert rng.key_seed(42, "noise/video", "clip_001", 3) == 1365785977474678049


def test_the_global_stream_is_not_touched() -> None:
    before = torch.get_rng_state()
    rng.normal((8,), 0, "x")
    rng.uniform(0, "x")
    rng.choice(3, 0, "x")
    assert torch.equal(before, torch.get_rng_state())


def test_choice_covers_its_range() -> None:
    assert {rng.choice(3, 0, "x", "", i) for i in range(60)} == {0, 1, 2}
