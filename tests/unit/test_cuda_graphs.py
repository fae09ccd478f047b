"""Recorded passes, with a recorder that repeats the work on the same fixed tensors: what a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltx_train.assembly import model_builder, update_builder
from ltx_train.assembly.setup import Setup, setup
from ltx_train.config import compose_config
from ltx_train.contracts import Exit
from ltx_train.diffusion import objective
from ltx_train.distributed.ranks import ALONE
from ltx_train.memory.blocks.cuda_graphs import StepGraphs, signature
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.memory.weights.stores import HostStore, PeerStore, WeightStore
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.updates.protocol import Updates
from tests.conftest import command, settings

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Given:
    x: Tensor
    others: dict[str, Tensor]
    scale: float = 1.0
    missing: Tensor | None = None


@dataclass(frozen=True)
class Found:
    loss: Tensor


class Repeats:
    """Calls the work again at every replay; counts."""

    def __init__(self) -> None:
        self.records = self.releases = 0

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.records += 1
        return work

    def release(self) -> None:
        self.releases += 1


def graphs() -> tuple[StepGraphs, nn.Parameter, Repeats, list[Given]]:
    weight, recorder, calls = nn.Parameter(torch.ones(2)), Repeats(), list[Given]()

    def work(given: Given) -> Found:
        calls.append(given)
        loss = (weight * given.x).sum() * given.scale + given.others["y"].sum()
        loss.backward()
        return Found(loss.detach())

    return StepGraphs(work, [weight], recorder), weight, recorder, calls


def given(value: float, *, size: int = 2, scale: float = 1.0) -> Given:
    return Given(torch.full((1, size), value), {"y": torch.full((1,), value)}, scale)


def test_the_first_step_of_a_shape_runs_as_it_is_and_later_ones_are_replayed_on_fixed_tensors() -> None:
    step, weight, recorder, calls = graphs()
    first = given(1.0)
    assert float(step(first).loss) == 3
    assert calls[0] is first
    assert recorder.records == 0
    for value in (2.0, 3.0):
        assert float(step(given(value)).loss) == 3 * value
    assert recorder.records == 1
    assert calls[1] is calls[2]
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, 6.0]


def test_every_shape_and_plain_value_has_a_recording_of_its_own() -> None:
    step, _, recorder, _ = graphs()
    for made in (given(1.0), given(1.0), given(1.0, scale=0.5), given(1.0, scale=0.5), given(2.0, size=1)):
        step(made)
    assert recorder.records == 2
    assert recorder.releases == 2, "an unknown shape needs the memory of the known ones"
    step(given(5.0))
    assert recorder.records == 3


def test_released_recordings_are_made_again() -> None:
    step, _, recorder, _ = graphs()
    for _ in range(3):
        step(given(1.0))
    step.release()
    step.release()
    assert recorder.releases == 1
    assert float(step(given(4.0)).loss) == 12
    assert recorder.records == 2


def test_a_replaced_gradient_is_an_error() -> None:
    step, weight, _, _ = graphs()
    step(given(1.0))
    step(given(1.0))
    weight.grad = None
    with pytest.raises(RuntimeError, match="was replaced"):
        step(given(1.0))


def test_signatures_tell_apart_what_a_recording_depends_on() -> None:
    whole = given(1.0)
    assert signature(whole) == signature(given(2.0))
    others = (
        given(1.0, size=3),
        given(1.0, scale=2.0),
        Given(whole.x, {"z": whole.others["y"]}),
        Given(whole.x.double(), whole.others),
        Given(whole.x, whole.others, missing=whole.x),
    )
    assert len({signature(whole), *(signature(other) for other in others)}) == 6


@pytest.mark.slow
def test_a_run_with_recorded_passes_is_the_run_without(
    prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step, dropout, measurements between: weights and moments are bit for bit the same."""
    recorder = Repeats()

    def recorded(_setup: Setup, transformer: Any, parameters: Any) -> StepGraphs[Any, Any]:
        return StepGraphs(partial(objective.backward, transformer), parameters, recorder)

    whole = update_builder.whole_updates

    def in_place(made: Setup, parameters: Any) -> Updates:
        return whole(replace(made, memory=replace(made.memory, graphs=True)), parameters)

    for name in ("plain", "recorded"):
        if name == "recorded":
            monkeypatch.setattr(model_builder, "pass_graphs", recorded)
            monkeypatch.setattr(update_builder, "whole_updates", in_place)
        more = (
            f"run.experiment={name}", f"run.root={tmp_path}", "optim.steps=8", "optim.batch_size=2",
            "optim.global_batch=4", "optim.name=adamw", "adapter.dropout=0.1", "memory=none", "eval.interval=4",
            "eval.quantiles=1", "checkpoint.interval=8", "loss.balance=auto",
        )  # fmt: skip
        assert command("fit", *settings(prepared, clips, *more)) == Exit.DONE
    first, second = (tmp_path / name / "main/checkpoints/step-000008" for name in ("plain", "recorded"))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert recorder.records == 2, "once at first, once after the measurement at step 4"
    assert recorder.releases == 2


def test_graphs_of_a_gpu_are_refused_on_a_cpu(capsys: pytest.CaptureFixture[str], prepared: Path, clips: Path) -> None:
    assert command("fit", *settings(prepared, clips, "memory.graphs=true", "strategy.device=cpu")) == 77
    assert "memory.graphs=true records work of a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("store", "recorded"), [(HostStore(CPU), True), (PeerStore(ALONE.exchange(), CPU), False)])
def test_passes_whose_blocks_a_collective_gathers_are_launched(
    store: WeightStore, recorded: bool, prepared: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_builder, "CudaRecorder", lambda _runner, _device: Repeats())
    made = setup(compose_config([*settings(prepared, clips), "memory.graphs=true"]))
    stream = WeightStream([0], 1, CPU, store)
    model: Any = SimpleNamespace(run_block=BlockRunner([Keep.inputs], compiled=False, stream=stream))
    assert (model_builder.pass_graphs(made, model, []) is not None) == recorded
