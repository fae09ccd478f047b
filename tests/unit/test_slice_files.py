"""A checkpoint in slices: whole or absent like any other, and read by name on any number of ranks."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.training.checkpoints import commit, manifest
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.updates.slice_files import MOMENTS, StateSlice

NAMES = {"a.weight": (3, 5), "a.bias": (7,), "b": (2, 2, 2), "c": ()}


def state(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(kind))
    return {name: torch.rand(shape, generator=generator) for name, shape in NAMES.items()}


def slices(world: int, steps: float | None = 4.0) -> list[StateSlice]:
    """Two units; parameters begin at multiples of 4 and go over the edges of slices."""
    units = {"first": ["a.weight", "a.bias"], "second": ["b", "c"]}
    layout: dict[str, list[tuple[str, int, list[int]]]] = {}
    tensors: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(world)]
    kinds = ("master", *(MOMENTS if steps is not None else ()))
    for unit, names in units.items():
        start = 0
        places: list[tuple[str, int, list[int]]] = []
        for name in names:
            places.append((name, start, list(NAMES[name])))
            start += -(-state("master")[name].numel() // 4) * 4
        layout[unit] = places
        for kind in kinds:
            flat = torch.zeros(-(-start // (4 * world)) * 4 * world)
            for name, first, _ in places:
                flat[first : first + state(kind)[name].numel()] = state(kind)[name].reshape(-1)
            for rank, part in enumerate(flat.chunk(world)):
                tensors[rank].setdefault(unit, {})[kind] = part.clone()
    groups = [{"lr": 0.1, "params": [0, 1, 2, 3]}]
    return [
        StateSlice(
            rank=r,
            world=world,
            tensors=tensors[r],
            layout=layout,
            order=["a.bias", "a.weight", "b", "c"],
            groups=groups,
            steps=steps,
        )
        for r in range(world)
    ]


def saved(folder: Path, world: int, steps: float | None = 4.0) -> Path:
    parts = [
        Checkpoint(step=9, weights={}, optimizer={}, notes={"n": 1}, slice=own, name="same")
        for own in slices(world, steps)
    ]
    with ThreadPoolExecutor(world) as ranks:
        others = [ranks.submit(commit.contribute, folder, part) for part in parts[1:]]
        path = commit.save(folder, parts[0], keep=2)
    assert all(other.exception() is None for other in others)
    return path


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_ranks_save_is_read_by_name(world: int, tmp_path: Path) -> None:
    path = saved(tmp_path, world)
    assert commit.committed(tmp_path) == [path]
    loaded = commit.load(path)
    assert set(loaded.weights) == set(NAMES)
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in state("master").items())
    for number, name in enumerate(["a.bias", "a.weight", "b", "c"]):
        own = loaded.optimizer["state"][number]
        assert float(own["step"]) == 4
        assert all(torch.equal(own[kind], state(kind)[name]) for kind in MOMENTS)
    assert loaded.optimizer["param_groups"] == [{"lr": 0.1, "params": [0, 1, 2, 3]}]
    assert not [p for p in path.iterdir() if p.suffix not in (".json", ".safetensors")]


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    assert commit.load(saved(tmp_path, 2, steps=None)).optimizer["state"] == {}


def test_a_rank_that_cannot_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leading rank tells why, and what was there before stays."""
    before = saved(tmp_path, 2)
    first, second = (
        Checkpoint(step=10, weights={}, optimizer={}, notes={}, slice=own, name="same") for own in slices(2)
    )

    def full(folder: Path, own: StateSlice) -> None:
        if own.rank == 1:
            raise OSError(28, "No space left on device")
        write(folder, own)

    write = commit.slice_files.write
    monkeypatch.setattr(commit.slice_files, "write", full)
    with ThreadPoolExecutor(1) as other:
        other.submit(commit.contribute, tmp_path, second)
        with pytest.raises(DataError, match=r"rank 1: .*No space left"):
            commit.save(tmp_path, first, keep=2)
    assert commit.committed(tmp_path) == [before]
    assert list(tmp_path.iterdir()) == [before]


def test_a_rank_that_never_writes_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_PATIENCE_S", 0.1)
    with pytest.raises(DataError, match="rank 1 has not written its file"):
        commit.save(tmp_path, Checkpoint(step=1, weights={}, optimizer={}, notes={}, slice=slices(2)[0]), keep=2)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_missing_shard_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, 2)
    victim = path / "shard-00001-of-00002.safetensors"
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert commit.committed(tmp_path) == [path]
    with pytest.raises(DataError, match="shard-00001-of-00002"):
        commit.load(path)
    files = list(json.loads((path / "manifest.json").read_text())["files"])
    part = files.index(victim.name) % 2
    with pytest.raises(DataError, match="shard-00001-of-00002"):
        manifest.verify(path, part, 2)
    manifest.verify(path, 1 - part, 2)
    victim.unlink()
    assert commit.committed(tmp_path) == []
