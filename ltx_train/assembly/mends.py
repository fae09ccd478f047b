"""Changes of a configuration that make a run fit, the cheapest first.

A change is a set of overrides. It is tried as the configuration that `config.changed` makes of it, so that nothing is
offered which the rules would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ltx_train import config as configuration
from ltx_train.assembly import resolve
from ltx_train.config import Config, ConfigError
from ltx_train.config.rules import STORED_AS
from ltx_train.config.settings import shown
from ltx_train.memory.planning.search import MemoryPlan
from ltx_train.updates.kinds import OPTIMIZERS

# Fidelity costs more than time: a mend that changes the result counts as this much slower.
_CHANGES_RESULT = 2.0
_SHORTER = (0.75, 0.5, 0.25)

Planner = Callable[[Config], MemoryPlan | None]


@dataclass(frozen=True, slots=True)
class Change:
    """Overrides by setting. cost: factor on the step time, above 1 where the change alters what is trained."""

    overrides: dict[str, Any]
    cost: float = 1.0

    @property
    def text(self) -> str:
        return " ".join(f"{name}={shown(value)}" for name, value in self.overrides.items())


@dataclass(frozen=True, slots=True)
class Mend:
    """A change that makes a run fit, and its plan."""

    change: Change
    plan: MemoryPlan

    @property
    def cost(self) -> float:
        return self.change.cost * self.plan.footprint.step_s

    def __str__(self) -> str:
        foot = self.plan.footprint
        return f"{self.change.text}   ({foot.gib:.1f} GiB, about {foot.step_s:.2f} s a step)"


def cheapest(config: Config, plan: Planner, count: int = 3, *, training: bool = True) -> list[Mend]:
    """Up to `count` mends: single changes, then pairs of changes none of which is enough alone. training: whether
    changes of the updates help too."""
    changes = [*_changes_of_the_model(config), *(_changes_of_training(config) if training else ())]
    singles = [(change, _tried(config, change, plan)) for change in changes]
    mends = [mend for _, mend in singles if mend is not None]
    if len(mends) < count:
        # A pair with a change that is enough alone would be no choice beside it.
        weak = [change for change, mend in singles if mend is None]
        pairs = [_joined(a, b) for a, b in combinations(weak, 2) if not a.overrides.keys() & b.overrides.keys()]
        mends += [mend for pair in pairs if (mend := _tried(config, pair, plan)) is not None]
    return sorted(mends, key=lambda m: m.cost)[:count]


def _joined(a: Change, b: Change) -> Change:
    return Change({**a.overrides, **b.overrides}, a.cost * b.cost)


def _tried(config: Config, change: Change, plan: Planner) -> Mend | None:
    """None where the rules refuse the changed configuration, or where it does not fit either."""
    try:
        changed = configuration.changed(config, change.overrides)
    except ConfigError:
        return None
    found = plan(changed)
    return None if found is None else Mend(change, found)


def _changes_of_the_model(config: Config) -> Iterator[Change]:
    fixed = resolve.fixed_memory_settings(config)
    choice = resolve.memory_choice(config)
    quantize, compute = resolve.precision(config)
    if fixed:
        yield Change(dict.fromkeys(fixed))
    if choice.graphs or "memory.graphs" not in fixed:
        yield Change({"memory.graphs": False})
    if compute == "bf16" and quantize in ("none", "auto"):
        yield Change({"memory.quantize": "int8"})
    if compute != "bf16" and quantize == "none":
        yield Change({"memory.quantize": STORED_AS[compute]})
    if compute == "bf16" and quantize != "int4":
        yield Change({"memory.quantize": "int4"}, 1.2)
    for share in _SHORTER:
        shorter = [str(bucket.shortened(share)) for bucket in resolve.buckets(config)]
        if shorter != config.data.buckets:
            yield Change({"data.buckets": shorter}, _CHANGES_RESULT / share)


def _changes_of_training(config: Config) -> Iterator[Change]:
    sharing = resolve.sharing(config)
    if sharing.saves_slices and sharing.offload is None:
        yield Change({"strategy.offload": "cpu"})
    yield from _smaller_optimizers(config)
    if config.eval.samples:
        yield Change({"eval.samples": 0})
    if config.optim.batch_size > 1:
        yield Change({"optim.batch_size": 1}, 1.1)
    if not sharing.full and config.adapter.rank >= 16:
        yield Change({"adapter.rank": config.adapter.rank // 2}, _CHANGES_RESULT)


def _smaller_optimizers(config: Config) -> Iterator[Change]:
    """Of the kinds with equally small moments the first alone."""
    own, seen = resolve.optimizer(config), set[float]()
    for kind in OPTIMIZERS.values():
        if kind.moment_bytes < own.moment_bytes and kind.moment_bytes not in seen:
            seen.add(kind.moment_bytes)
            yield Change({"optim.name": kind.name})
