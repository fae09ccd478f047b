"""Host memory and files for what the optimizer keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import DataError
from ltx_train.memory.host import Host


@pytest.mark.parametrize("files", [True, False])
def test_room_has_the_values_and_keeps_changes(files: bool, tmp_path: Path) -> None:
    host = Host(tmp_path / "rank" if files else None)
    given = torch.arange(7, dtype=torch.bfloat16)
    room = host.room("transformer_blocks.0/master", given)
    assert (room.dtype, room.tolist()) == (torch.float32, list(range(7)))
    room += 1
    assert given.tolist() == list(range(7))
    if files:
        found = tmp_path / "rank" / "transformer_blocks.0.master.f32"
        assert torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.float32).tolist() == list(range(1, 8))


def test_gradients_are_added_once_each_and_in_order() -> None:
    host, seen = Host(None), list[tuple[str, list[float]]]()

    def add(name: str, share: torch.Tensor) -> None:
        seen.append((name, share.tolist()))

    host.take("a", torch.tensor([1.0]), add)
    host.take("b", torch.tensor([2.0]), add)
    host.take("a", torch.tensor([3.0]), add)
    host.settle(add)
    host.settle(add)
    assert seen == [("a", [1.0]), ("b", [2.0]), ("a", [3.0])]


def test_a_full_disk_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"strategy.offload: .*master.f32 cannot be made .*No space"):
        Host(tmp_path).room("x/master", torch.zeros(3))
