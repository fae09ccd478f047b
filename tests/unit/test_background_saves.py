from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.background import Saver, Snapshot
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.updates.slice_files import StateSlice


def state(value: float) -> dict[str, Any]:
    return {
        "state": {0: {"step": torch.tensor(value), "exp_avg": torch.full((2, 3), value)}},
        "groups": [{"lr": value}],
    }


def moment(taken: dict[str, Any]) -> Tensor:
    return taken["state"][0]["exp_avg"]


def test_the_memory_of_the_last_save_is_taken_again() -> None:
    snapshot, live = Snapshot(), state(1.0)
    first = snapshot.of(live, ("optimizer",))
    other = snapshot.of(live, ("weights",))
    moment(live).fill_(2.0)
    assert moment(first).eq(1).all()
    second = snapshot.of(live, ("optimizer",))
    assert moment(second).data_ptr() == moment(first).data_ptr() != moment(other).data_ptr()
    assert moment(second).eq(2).all()
    assert moment(other).eq(1).all()
    assert second["groups"] == [{"lr": 1.0}]
    larger = snapshot.of({"state": {0: {"exp_avg": torch.ones(4)}}}, ("optimizer",))
    assert moment(larger).tolist() == [1.0] * 4


def test_memory_that_was_made_ready_is_what_is_taken() -> None:
    snapshot, tensors = Snapshot(), {"block": {"master": torch.arange(6.0).view(2, 3).to(torch.bfloat16)}}
    snapshot.prepare(tensors, ("slice",))
    (buffer,) = snapshot._buffers.values()
    taken = snapshot.of(tensors, ("slice",))["block"]["master"]
    assert taken.data_ptr() == buffer.data_ptr()
    assert torch.equal(taken, tensors["block"]["master"])


def test_saves_one_after_the_other_hold_their_own_steps(tmp_path: Path) -> None:
    """The second begins while nothing waits for memory of the first."""
    saver = Saver(tmp_path, 5, lambda _step, _weights: None)
    weights = {"a": torch.zeros(1000)}
    layout = {"a": [("a", 0, [1000])]}
    own = StateSlice(
        rank=0,
        world=1,
        tensors={"a": {"master": weights["a"]}},
        layout=layout,
        order=["a"],
        groups=[{"params": [0]}],
        steps=1.0,
    )
    saver.prepare(own).result()
    for step in (1, 2, 3):
        weights["a"].fill_(step)
        saver.start(Checkpoint(step=step, weights={}, optimizer={}, notes={}, slice=own))
        weights["a"].fill_(-1)
        saver.wait()
    saver.close()
    for path in commit.committed(tmp_path):
        assert commit.load(path).weights["a"][:].eq(int(path.name[-1])).all()
    assert len(commit.committed(tmp_path)) == 3
