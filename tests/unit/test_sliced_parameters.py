"""Sliced weights and their updates: several ranks in one process, a thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltx_train.distributed.exchange import Exchange, single_process
from ltx_train.memory.weights.stores import PeerStore
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.updates.kinds import OPTIMIZERS
from ltx_train.updates.optimizers import OptimizerSettings, build_optimizer
from ltx_train.updates.slice_files import MOMENTS
from ltx_train.updates.sliced import SlicedUpdates
from ltx_train.updates.sliced_parameters import SlicedParameters
from ltx_train.updates.state_offload import StateOffload

CPU = torch.device("cpu")
SIZES = (310, 5, 700)  # none is a multiple of the alignment: every unit is padded
SETTINGS = OptimizerSettings(lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)


class Meeting:
    """Collectives over threads: every rank leaves its value and takes what it needs of the others'."""

    def __init__(self, world: int) -> None:
        self._barrier, self._values, self._world = threading.Barrier(world), [None] * world, world

    def _all(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value.clone() if isinstance(value, Tensor) else value
        self._barrier.wait(120)
        values = list(self._values)
        self._barrier.wait(120)
        return values

    def exchange(self, rank: int) -> Exchange:
        def all_gather(whole: Tensor, own: Tensor) -> None:
            whole.copy_(torch.cat(self._all(rank, own)))

        def reduce_scatter(own: Tensor, whole: Tensor) -> None:
            own.copy_(torch.stack(self._all(rank, whole)).sum(0).chunk(self._world)[rank])

        def all_reduce(values: Tensor) -> None:
            values.copy_(torch.stack(self._all(rank, values)).sum(0))

        return Exchange(
            rank=rank, world=self._world, all_gather=all_gather, reduce_scatter=reduce_scatter, all_reduce=all_reduce,
            gather_objects=lambda value: self._all(rank, value),
        )  # fmt: skip


def on_ranks(world: int, work: Callable[[Exchange], Any]) -> list[Any]:
    meeting = Meeting(world)
    with ThreadPoolExecutor(world) as threads:
        return [f.result(30) for f in [threads.submit(work, meeting.exchange(rank)) for rank in range(world)]]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {f"unit{n}.weight": nn.Parameter(torch.randn(size, generator=generator)) for n, size in enumerate(SIZES)}


def sliced(
    exchange: Exchange, *, offload: StateOffload | None = None
) -> tuple[SlicedParameters, dict[str, nn.Parameter]]:
    made, named = SlicedParameters(exchange, CPU, torch.float32, offload=offload), parameters()
    for name, parameter in named.items():
        made.add_resident(name.partition(".")[0], [(name, parameter)])
    made.prepare_gradients()
    return made, named


def gradient(name: str, rank: int, step: int) -> Tensor:
    size = SIZES[int(name[4])]
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + int(name[4])))


def test_padding_never_counts_in_the_norm() -> None:
    """Three units share two slots, and a replay of a CUDA graph runs no Python: reducing must clear the padding every
    time. Gradients of ones, reduced twice: the norm is 2 * sqrt(310 + 5 + 700)."""
    made, named = sliced(single_process())
    for _ in range(2):
        for name, parameter in named.items():
            # What another unit left in the slot, beyond this unit's parameters.
            for slot in made._slots:
                slot.memory.fill_(7.0)
            parameter.grad = torch.ones_like(parameter)
            made.reduce(name.partition(".")[0])
    made.wait_for_gradients()
    assert float(made.norm()) == pytest.approx((4 * sum(SIZES)) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_parameter_without_a_gradient_adds_nothing(in_place: bool) -> None:
    made = SlicedParameters(single_process(), CPU, torch.float32)
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    made.add_resident("unit", [("a", first), ("b", second)])
    made.prepare_gradients()
    made._slots[0].memory.fill_(9.0)
    first.grad = torch.full((3,), 2.0)
    made.reduce("unit", in_place=in_place)
    assert float(made.norm()) == pytest.approx(12**0.5)
    assert (first.grad is None) == (not in_place)
    assert first.grad is None or not first.grad.any()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("offloaded", [False, True])
def test_ranks_reduce_to_slices_of_the_mean(world: int, offloaded: bool) -> None:
    def work(exchange: Exchange) -> tuple[dict[str, Tensor], float]:
        made, named = sliced(exchange, offload=StateOffload(None) if offloaded else None)
        for name, parameter in named.items():
            parameter.grad = gradient(name, exchange.rank, 0)
            made.reduce(name.partition(".")[0])
        made.wait_for_gradients()
        gradients = {unit: master.grad.clone() for unit, master in made.masters.items() if master.grad is not None}
        return gradients, float(made.norm())

    outcomes = on_ranks(world, work)
    means = {name: torch.stack([gradient(name, r, 0) for r in range(world)]).mean(0) for name in parameters()}
    for name, mean in means.items():
        whole = torch.cat([gradients[name.partition(".")[0]] for gradients, _ in outcomes])
        torch.testing.assert_close(whole[: mean.numel()], mean)
        assert not whole[mean.numel() :].any(), "padding"
        assert len(whole) % (256 * world) == 0
    norm = float(torch.cat(list(means.values())).norm())
    assert [n for _, n in outcomes] == pytest.approx([norm] * world, rel=1e-5)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("reduce_each_pass", [True, False])
def test_sliced_steps_are_those_of_one_process_and_restore_on_another_number_of_ranks(
    world: int, reduce_each_pass: bool
) -> None:
    """Four steps of AdamW with clipping; the state that the ranks save is that of one process, and continues on it."""

    def updates(exchange: Exchange) -> tuple[SlicedUpdates, dict[str, nn.Parameter]]:
        made, named = sliced(exchange)
        optimizer = build_optimizer(OPTIMIZERS["adamw"], made.masters.values(), SETTINGS)
        made.place_moments(optimizer, MOMENTS)
        return SlicedUpdates(
            made, optimizer, order=list(named), deferred_units=list(made.units), reduce_each_pass=reduce_each_pass,
            saves_slices=False, in_place=False,
        ), named  # fmt: skip

    def steps(made: SlicedUpdates, named: dict[str, nn.Parameter], rank: int, numbers: range) -> None:
        for step in numbers:
            for name, parameter in named.items():
                parameter.grad = gradient(name, rank, step)
            made.end_pass()
            made.average()
            made.step(1.0)

    def work(exchange: Exchange) -> tuple[Any, dict[str, Tensor]]:
        made, named = updates(exchange)
        steps(made, named, exchange.rank, range(3))
        saved = made.state()
        saved = (
            {name: tensor.clone() for name, tensor in saved.weights.items()},
            {"state": {n: {k: v.clone() for k, v in s.items()} for n, s in saved.optimizer["state"].items()},
             "param_groups": saved.optimizer["param_groups"]},
        )  # fmt: skip
        steps(made, named, exchange.rank, range(3, 4))
        return saved, {name: p.detach().clone() for name, p in named.items()}

    def alone(numbers: range, saved: Any = None) -> dict[str, Tensor]:
        """One process with the mean of the ranks' gradients."""
        named = parameters()
        optimizer = torch.optim.AdamW(named.values(), lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
        if saved is not None:
            for name, parameter in named.items():
                parameter.data.copy_(saved[0][name])
            optimizer.load_state_dict(deepcopy(saved[1]))
        for step in numbers:
            for name, parameter in named.items():
                parameter.grad = torch.stack([gradient(name, r, step) for r in range(world)]).mean(0)
            torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimizer.step()
        return {name: p.detach() for name, p in named.items()}

    outcomes = on_ranks(world, work)
    expected = alone(range(4))
    for saved, weights in outcomes:
        last = alone(range(3, 4), saved)
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(last[name], tensor, rtol=1e-5, atol=1e-6)

    def continued(exchange: Exchange) -> dict[str, Tensor]:
        made, named = updates(exchange)
        made.restore(*outcomes[0][0])
        # The gradients of all former ranks, so that the mean stays the same.
        for name, parameter in named.items():
            parameter.grad = torch.stack([gradient(name, r, 3) for r in range(world)]).mean(0)
        made.end_pass()
        made.average()
        made.step(1.0)
        return {name: p.detach().clone() for name, p in named.items()}

    for weights in on_ranks(world + 1, continued):
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 3])
def test_a_streamed_units_weights_follow_its_masters(world: int) -> None:
    """The store's slices, the ring and the masters after `publish`; odd sizes, so that slices end within parameters."""

    original = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3))
    plain = {name: p.detach().clone() for name, p in original.named_parameters()}

    def work(exchange: Exchange) -> tuple[dict[str, Tensor], Tensor]:
        block = deepcopy(original).requires_grad_(False)
        store = PeerStore(exchange, CPU)
        stream = WeightStream([0], 1, CPU, store)
        stream.stash(0, block)
        stream.allocate_ring()
        made = SlicedParameters(exchange, CPU, torch.float32)
        made.add_streamed("block", block.requires_grad_(True), 0, stream, store)
        made.prepare_gradients()
        with torch.no_grad():
            for master in made.masters.values():
                master.mul_(2).add_(1)
        made.publish()
        stream.begin(0, backward=False, training=True)
        stream.verify()
        return {name: p.detach().clone() for name, p in made.parameters}, made.masters["block"].detach()

    outcomes = on_ranks(world, work)
    assert len({len(master) for _, master in outcomes}) == 1
    for weights, _ in outcomes:
        assert weights.keys() == {f"block.{name}" for name in plain}
        for name, parameter in plain.items():
            torch.testing.assert_close(weights[f"block.{name}"], parameter * 2 + 1)


def test_slices_change_between_two_barriers() -> None:
    """Before them a late rank may still copy out of this one's slices, behind them all slices are new."""
    at_barrier: list[Tensor] = []
    exchange = replace(single_process(), all_reduce=lambda _zero: at_barrier.append(store.own_slice(0).clone()))
    store = PeerStore(exchange, CPU)
    stream = WeightStream([0], 1, CPU, store)
    block = nn.Linear(8, 8, bias=False).requires_grad_(False)
    stream.stash(0, block)
    stream.allocate_ring()
    made = SlicedParameters(exchange, CPU, torch.float32)
    made.add_streamed("block", block.requires_grad_(True), 0, stream, store)
    before = store.own_slice(0).clone()
    with torch.no_grad():
        made.masters["block"].add_(1)
    made.publish()
    old, new = at_barrier
    assert torch.equal(old, before)
    assert torch.equal(new, store.own_slice(0))
    assert not torch.equal(old, new)


def test_a_step_beyond_the_limit_changes_nothing_and_forgets_its_gradient() -> None:
    made, named = sliced(single_process())
    optimizer = build_optimizer(OPTIMIZERS["adamw"], made.masters.values(), SETTINGS)
    updates = SlicedUpdates(
        made, optimizer, order=list(named), deferred_units=list(made.units), reduce_each_pass=True, saves_slices=True,
        in_place=False,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, parameter in named.items():
        parameter.grad = gradient(name, 0, 0)
    updates.end_pass()
    updates.average()
    norm = updates.step(1.0, limit=torch.tensor(1e-3))
    assert float(norm) > 1
    assert all(torch.equal(p.detach(), before[name]) for name, p in named.items())
    assert not any(master.grad.any() for master in made.masters.values() if master.grad is not None)
    state = updates.state().slice
    assert state is not None
    assert state.steps is None or state.steps == 0
