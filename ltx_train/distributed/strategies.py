"""The table of strategies: what the devices of a run share under each name, and whose ZeRO shares it.

Imports no heavy library. The configuration takes its choices from here, `assembly.resolve` makes a run's `Sharing` of
an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AUTO, OWN, DEEPSPEED = "auto", "own", "deepspeed"
ENGINES = (AUTO, OWN, DEEPSPEED)
# DeepSpeed slices masters, moments and gradients of an adapter. The frozen base is sliced within each machine.
_ADAPTER_STAGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyKind:
    """One strategy.

    several: whether it takes more than one process.
    full_stage: what each rank holds a slice of when all weights are trained: 0 nothing, 1 masters and moments,
    2 gradients too, 3 weights too. adapter_stage: the same when an adapter is trained by the own engine.
    slices_frozen_blocks: whether the frozen blocks of an adapter run are sliced over the devices of a machine.
    trains_all_weights: whether every weight can be trained with it.
    """

    name: str
    several: bool = True
    full_stage: int = 0
    adapter_stage: int = 0
    slices_frozen_blocks: bool = False
    trains_all_weights: bool = True

    @property
    def is_zero(self) -> bool:
        """Whether it slices anything, which an engine has to do."""
        return self.full_stage > 0

    def engine(self, asked: str, machines: int) -> str:
        """OWN or DEEPSPEED. asked: `strategy.engine`. The own ZeRO copies between the devices of one machine, so
        DeepSpeed's takes its place on several. Copies of a model need no engine."""
        if not self.is_zero:
            return OWN
        if asked != AUTO:
            return asked
        return DEEPSPEED if machines > 1 else OWN

    def update_stage(self, *, full: bool, engine: str) -> int:
        """The ZeRO stage of the trained weights."""
        if full:
            return self.full_stage
        return self.adapter_stage if engine == OWN else min(self.full_stage, _ADAPTER_STAGE)


_KINDS = (
    StrategyKind(name="single", several=False),
    StrategyKind(name="ddp", trains_all_weights=False),
    StrategyKind(name="zero1", full_stage=1, adapter_stage=1),
    StrategyKind(name="zero2", full_stage=2, adapter_stage=2),
    StrategyKind(name="zero3", full_stage=3, slices_frozen_blocks=True),
)
STRATEGIES: Mapping[str, StrategyKind] = {kind.name: kind for kind in _KINDS}
