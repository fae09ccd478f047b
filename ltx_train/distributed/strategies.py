"""The table of strategies: what the devices of a run share under each name. Imports no heavy library.

The configuration takes its choices from here, `assembly.resolve` makes a run's `Sharing` of an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OWN, DEEPSPEED = "own", "deepspeed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyKind:
    """One strategy.

    several: whether it takes more than one process.
    full_stage: what each rank holds a slice of when all weights are trained: 0 nothing, 1 masters and moments,
    2 gradients too, 3 weights too. adapter_stage: the same when an adapter is trained.
    slices_frozen_blocks: whether the frozen blocks of an adapter run are sliced over the ranks.
    trains_all_weights: whether every weight can be trained with it. engine: whose ZeRO it is.
    """

    name: str
    several: bool = True
    full_stage: int = 0
    adapter_stage: int = 0
    slices_frozen_blocks: bool = False
    trains_all_weights: bool = True
    engine: str = OWN

    def update_stage(self, *, full: bool) -> int:
        """The ZeRO stage of the trained weights."""
        return self.full_stage if full else self.adapter_stage


_KINDS = (
    StrategyKind(name="single", several=False),
    StrategyKind(name="ddp", trains_all_weights=False),
    StrategyKind(name="zero1", full_stage=1, adapter_stage=1),
    StrategyKind(name="zero2", full_stage=2, adapter_stage=2),
    StrategyKind(name="zero3", full_stage=3, slices_frozen_blocks=True),
    StrategyKind(name="deepspeed_zero1", full_stage=1, adapter_stage=1, engine=DEEPSPEED),
    StrategyKind(name="deepspeed_zero2", full_stage=2, adapter_stage=2, engine=DEEPSPEED),
    StrategyKind(name="deepspeed_zero3", full_stage=3, adapter_stage=3, slices_frozen_blocks=True, engine=DEEPSPEED),
)
STRATEGIES: Mapping[str, StrategyKind] = {kind.name: kind for kind in _KINDS}
