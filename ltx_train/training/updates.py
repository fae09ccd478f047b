"""One optimizer step on all ranks' gradients: averaged, clipped, applied; and what of it a checkpoint holds.

Owns the two ways: every rank updates every weight (single, ddp, ZeRO-3 of a frozen base), or each a share of them
(ZeRO). Both save and restore the same state by parameter name and number, so that a run may change between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltx_train.memory.shares import Place, Shares, Unit
from ltx_train.model import adapter
from ltx_train.training.guard import step_within
from ltx_train.training.ranks import Ranks
from ltx_train.training.shards import MOMENTS, Shard


@dataclass(frozen=True, slots=True)
class Held:
    """What a checkpoint takes: weights by name and `optimizer.state_dict()`, or this rank's shard of both."""

    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shard: Shard | None = None


class Updates(Protocol):
    """Gradients gather in parameters over passes; then `average`, and `step`."""

    optimizer: torch.optim.Optimizer

    @property
    def gathering(self) -> list[nn.Parameter]:
        """Those whose gradients stay where they are from pass to pass, where gradients keep their memory."""
        ...

    def passed(self) -> None:
        """After each backward pass."""
        ...

    def average(self) -> None:
        """The gradients of all rounds and ranks become their mean."""
        ...

    def norms(self) -> dict[str, Tensor]:
        """The averaged gradient's norm by part of the block, before clipping, where each rank has all of it."""
        ...

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        """Clips (0: does not), updates unless the norm is not finite or above the limit, forgets the gradients; the
        norm before."""
        ...

    def held(self) -> Held: ...

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None: ...


def _begin_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Before the first pass: each would otherwise come to lie in memory of its activations, which then cannot be given
    back."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


class WholeUpdates:
    """Every rank has every gradient and updates every weight. in_place: gradients keep their memory."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks, *, in_place: bool
    ) -> None:
        self._named, self._parameters = parameters, list(parameters.values())
        self.optimizer, self._ranks, self._in_place = optimizer, ranks, in_place
        if in_place:
            _begin_gradients(self._parameters)

    @property
    def gathering(self) -> list[nn.Parameter]:
        return self._parameters

    def passed(self) -> None:
        pass

    def average(self) -> None:
        # A mode that none of this rank's samples is in leaves no gradient; moments must go on as on every other rank.
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.average([p.grad for p in self._parameters if p.grad is not None])

    def norms(self) -> dict[str, Tensor]:
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                groups.setdefault(adapter.module_group(name), []).append(parameter.grad)
        return {group: torch.nn.utils.get_total_norm(grads) for group, grads in groups.items()}

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, clip if clip > 0 else float("inf"))
        step_within(self.optimizer, norm, limit)
        self.optimizer.zero_grad(set_to_none=not self._in_place)
        return norm

    def held(self) -> Held:
        return Held({name: p.detach() for name, p in self._named.items()}, self.optimizer.state_dict())

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        adapter.refuse_misfit({name: parameter.shape for name, parameter in self._named.items()}, weights)
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(weights[name])
        # Values of a sharded checkpoint are read only now.
        state = {number: dict(values) for number, values in optimizer["state"].items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": optimizer["param_groups"]})


class SharedUpdates:
    """Each rank updates its share of every unit (AdamW, elementwise). order: the parameters' names as one process
    numbers them. left: units whose gradients nobody shares out at the end of their block's backward. early: that is
    done after each pass (ZeRO-2) instead of once a step. sharded: checkpoints are too; otherwise the leading rank's is
    whole. in_place: the parameters' gradients keep their memory."""

    def __init__(
        self, shares: Shares, optimizer: torch.optim.Optimizer, order: Sequence[str], left: Sequence[str], *,
        early: bool, sharded: bool, in_place: bool,
    ) -> None:  # fmt: skip
        self._shares, self.optimizer, self._left = shares, optimizer, left
        self._number = {name: number for number, name in enumerate(order)}
        self._early, self._sharded, self._in_place = early, sharded, in_place
        if in_place:
            _begin_gradients(self.gathering)

    @property
    def gathering(self) -> list[nn.Parameter]:
        return [place.parameter for name in self._left for place in self._shares.units[name].places]

    def passed(self) -> None:
        if self._early:
            self._reduce()

    def average(self) -> None:
        if not self._early:
            self._reduce()
        self._shares.settle()

    def norms(self) -> dict[str, Tensor]:
        return {}

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        norm = self._shares.norm()
        if clip > 0:
            self._shares.scale(torch.clamp(clip / (norm + 1e-6), max=1.0))
        step_within(self.optimizer, norm, limit)
        self._shares.forget()
        self._shares.publish()
        return norm

    def held(self) -> Held:
        state = self.optimizer.state
        own = {
            name: {"master": master.detach(), **{k: state[master][k] for k in MOMENTS if k in state[master]}}
            for name, master in self._shares.masters.items()
        }
        steps = state[next(iter(self._shares.masters.values()))].get("step")
        group = self.optimizer.state_dict()["param_groups"][0]
        groups = [{**group, "params": list(range(len(self._number)))}]
        if not self._sharded:
            return self._gathered(own, steps, groups)
        layout = {
            name: [(place.name, place.start, list(place.shape)) for place in unit.places]
            for name, unit in self._shares.units.items()
        }
        exchange, done = self._shares.exchange, None if steps is None else float(steps)
        return Held(shard=Shard(exchange.rank, exchange.world, own, layout, list(self._number), groups, done))

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        shapes = {place.name: place.shape for unit in self._shares.units.values() for place in unit.places}
        adapter.refuse_misfit(shapes, weights)
        for name, unit in self._shares.units.items():
            master = self._shares.masters[name]
            # Read one by one: a checkpoint in shards does not fit into a rank's memory.
            self._fill(master, [(place, lambda own=place.name: weights[own]) for place in unit.places])
            if optimizer["state"]:
                self.optimizer.state[master] = self._state(master, unit, optimizer["state"])
        self._shares.publish()

    def _state(self, master: Tensor, unit: Unit, saved: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        numbered = [(place, saved[self._number[place.name]]) for place in unit.places]
        present = self.optimizer.state.get(master, {})
        state = {kind: present[kind] if kind in present else torch.zeros_like(master) for kind in MOMENTS}
        for kind, share in state.items():
            self._fill(share, [(place, lambda own=values, kind=kind: own[kind]) for place, values in numbered])
        steps = torch.as_tensor(numbered[0][1]["step"], dtype=torch.float32)
        # torch keeps the number of steps where its kernel reads it.
        fused = self.optimizer.param_groups[0].get("fused")
        return {**state, "step": steps.to(master.device if fused else "cpu", copy=True)}

    def _reduce(self) -> None:
        for name in self._left:
            self._shares.reduce(name, in_place=self._in_place)

    def _fill(self, share: Tensor, given: Sequence[tuple[Place, Callable[[], Tensor]]]) -> None:
        """The parts of tensors that fall into this rank's share; others are not read."""
        begin = share.numel() * self._shares.exchange.rank
        for place, read in given:
            first, last = max(place.start, begin), min(place.stop, begin + share.numel())
            if first < last:
                share[first - begin : last - begin].copy_(read().reshape(-1)[first - place.start : last - place.start])

    def _gathered(self, own: Mapping[str, Mapping[str, Tensor]], steps: Tensor | None, groups: list[Any]) -> Held:
        """As one process would save it: for adapters, which are small."""
        state: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(self._number))}
        for name, unit in self._shares.units.items():
            for kind in MOMENTS if steps is not None else ():
                whole = torch.empty(unit.size, device=self._shares.device)
                self._shares.exchange.gather(whole, own[name][kind])
                for place in unit.places:
                    state[self._number[place.name]][kind] = whole[place.start : place.stop].view(place.shape)
        if steps is None:
            state = {}
        weights = {name: p.detach() for name, p in self._shares.parameters}
        return Held(weights, {"state": {n: {"step": steps, **s} for n, s in state.items()}, "param_groups": groups})
