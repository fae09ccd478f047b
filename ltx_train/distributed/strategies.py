"""The table of strategies: what the devices of a run share under each name. Imports no heavy library.

The only place that knows strategies by name. The configuration takes its choices from here, `assembly.resolve` makes
a run's `Sharing` of an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyKind:
    """One strategy.

    several: whether it takes more than one process.
    update_stage: what each rank holds a slice of when all weights are trained: 0 nothing, 1 masters and moments,
    2 gradients too, 3 weights too. adapter_stage: the same when an adapter is trained.
    slices_frozen_blocks: whether the frozen blocks of an adapter run are sliced over the ranks.
    trains_all_weights: whether every weight can be trained with it.
    """

    name: str
    several: bool = True
    update_stage: int = 0
    adapter_stage: int = 0
    slices_frozen_blocks: bool = False
    trains_all_weights: bool = True


_KINDS = (
    StrategyKind(name="single", several=False),
    StrategyKind(name="ddp", trains_all_weights=False),
    StrategyKind(name="zero1", update_stage=1, adapter_stage=1),
    StrategyKind(name="zero2", update_stage=2, adapter_stage=2),
    StrategyKind(name="zero3", update_stage=3, slices_frozen_blocks=True),
)
STRATEGIES: Mapping[str, StrategyKind] = {kind.name: kind for kind in _KINDS}
