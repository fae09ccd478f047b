"""StateOffload memory and files for what the optimizer keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ltx_train.contracts import DataError
from ltx_train.updates import state_offload
from ltx_train.updates.state_offload import StateOffload, accumulate, norm


@pytest.mark.parametrize("files", [True, False])
def test_room_has_the_values_and_keeps_changes(files: bool, tmp_path: Path) -> None:
    offload = StateOffload(tmp_path / "rank" if files else None)
    given = torch.arange(7, dtype=torch.bfloat16)
    values = offload.allocate("transformer_blocks.0/master", given)
    assert (values.dtype, values.tolist()) == (torch.float32, list(range(7)))
    values += 1
    assert given.tolist() == list(range(7))
    if files:
        found = tmp_path / "rank" / "transformer_blocks.0.master.f32"
        assert torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.float32).tolist() == list(range(1, 8))


def test_gradients_are_added_once_each_and_in_order() -> None:
    offload, seen = StateOffload(None), list[tuple[str, list[float]]]()

    def add(name: str, share: torch.Tensor) -> None:
        seen.append((name, share.tolist()))

    offload.add_gradient("a", torch.tensor([1.0]), add)
    offload.add_gradient("b", torch.tensor([2.0]), add)
    offload.add_gradient("a", torch.tensor([3.0]), add)
    offload.wait_for_gradients(add)
    offload.wait_for_gradients(add)
    assert seen == [("a", [1.0]), ("b", [2.0]), ("a", [3.0])]


def test_a_full_disk_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"strategy.offload: .*master.f32 cannot be made .*No space"):
        StateOffload(tmp_path).allocate("x/master", torch.zeros(3))


@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_masters_and_gradients_travel_in_pieces(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_offload, "_SENT", 4)
    monkeypatch.setattr(state_offload, "_PIECE", 4)
    offload, weights = StateOffload(None), torch.zeros(count, dtype=torch.bfloat16)
    for factor in (1, 2):
        offload.send(torch.arange(count) * float(factor), weights)
        assert weights.tolist() == [factor * n for n in range(count)]
    total = torch.ones(count)
    accumulate(total, weights, 0.25)
    assert total.tolist() == [1 + 2 * n / 4 for n in range(count)]


def test_a_gradient_is_added_without_memory_for_the_whole_of_it() -> None:
    """torch would raise it to float32 as a whole first, in fresh memory."""
    total, share = torch.zeros(2**21), torch.ones(2**21, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        accumulate(total, share, 0.5)
    assert total.eq(0.5).all()
    taken = [event.cpu_memory_usage for event in seen.key_averages() if event.cpu_memory_usage > 0]
    assert max(event.cpu_memory_usage for event in seen.events()) <= 4 * 2**20 < sum(taken)


@pytest.mark.parametrize("count", [0, 1, 4096, 2**24 + 5])
def test_the_norm_of_many_values_is_exact(count: int) -> None:
    values = torch.full((count,), 0.1)
    expected = float(torch.tensor(0.1)) * count**0.5
    assert float(norm(values)) == pytest.approx(expected, rel=1e-5)
