"""When memory is not mapped: on which grounds, on all ranks alike, and what a run says of it. The rest needs GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ltx_train.assembly import model_builder
from ltx_train.contracts import ConfigError
from ltx_train.distributed import mapped_memory
from ltx_train.distributed.mapped_memory import map_all_ranks

CPU = torch.device("cpu")
OWN = {0: torch.zeros(4), 1: torch.ones(4)}


def gathers(*others: Any) -> Any:
    """The other ranks' values in each round."""
    rounds = iter(others)
    return lambda own: [own, next(rounds)]


@pytest.mark.parametrize(
    ("other", "handles", "expected"),
    [
        (("elsewhere", {0: "a", 1: "b"}), {0: "a", 1: "b"}, "the ranks are on several machines"),
        (("here", {}), {0: "a", 1: "b"}, "this torch gives no handles"),
        (("here", {0: "a", 1: "b"}), {}, "this torch gives no handles"),
        (("here", {0: "a", 1: "b"}), {0: "a", 1: "b"}, "rank 0 cannot open another device's memory (no such handle)"),
    ],
    ids=["machines", "other", "own", "opening"],
)
def test_a_refusal_names_its_reason(
    other: Any, handles: dict[int, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(handle: Any, _device: Any) -> Any:
        raise RuntimeError("no such handle\nmore")

    monkeypatch.setattr(mapped_memory, "boot_id", lambda: "here")
    monkeypatch.setattr(mapped_memory, "_handles", lambda _own, _device: handles)
    monkeypatch.setattr(mapped_memory, "_opened", broken)
    mapped = map_all_ranks(OWN, 0, CPU, gathers(other, ""))
    assert mapped.tensors is None
    assert expected in mapped.refusal


def test_the_refusal_of_one_rank_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_memory, "boot_id", lambda: "here")
    monkeypatch.setattr(mapped_memory, "_handles", lambda _own, _device: {0: "a", 1: "b"})
    monkeypatch.setattr(mapped_memory, "_opened", lambda handle, _device: handle)
    both = map_all_ranks(OWN, 0, CPU, gathers(("here", {0: "c", 1: "d"}), ""))
    assert both.tensors == {0: [OWN[0], "c"], 1: [OWN[1], "d"]}
    one = map_all_ranks(OWN, 0, CPU, gathers(("here", {0: "c", 1: "d"}), "rank 1 cannot"))
    assert (one.tensors, one.refusal) == (None, "rank 1 cannot")


def test_a_run_says_why_nccl_takes_the_place_of_copies(capsys: pytest.CaptureFixture[str]) -> None:
    for leads in (True, False):
        setup: Any = SimpleNamespace(ranks=SimpleNamespace(leads=leads))
        model_builder._report_fallback(setup, "blocks are gathered", "the ranks are on several machines")
        model_builder._report_fallback(setup, "gradients are summed", "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ltx-train: blocks are gathered by NCCL")
    assert line.endswith("the ranks are on several machines")


def test_ranks_of_a_machine_have_to_be_neighbours() -> None:
    """As srun starts them by default, and not dealt out in turn."""
    for boots, refused in ((["a", "a", "b", "b"], False), (["a", "b", "a", "b"], True)):
        ranks = SimpleNamespace(gather=lambda _own, boots=boots: boots, exchange=lambda size: size)
        setup: Any = SimpleNamespace(ranks=ranks, sharing=SimpleNamespace(local_world=2))
        if refused:
            with pytest.raises(ConfigError, match="--distribution=block"):
                model_builder._machine_exchange(setup)
        else:
            assert model_builder._machine_exchange(setup) == 2
