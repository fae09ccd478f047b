"""A run as it was decided: the configuration with its resolved objects, one on each rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltx_train.assembly import memory_plan, resolve
from ltx_train.assembly.resolve import Sharing
from ltx_train.config import Config
from ltx_train.distributed.ranks import ALONE, Ranks
from ltx_train.evaluation.share import Share
from ltx_train.memory.planning.search import MemoryPlan
from ltx_train.memory.planning.sizes import MemoryChoice
from ltx_train.updates.kinds import OptimizerKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """config: plain settings, as learning rates and paths; everything that had to be decided stands beside it.

    plan: None where nothing was planned. compiled: whether blocks are compiled.
    """

    config: Config
    ranks: Ranks
    device: torch.device
    sharing: Sharing
    memory: MemoryChoice
    budget_gib: float | None
    compiled: bool
    optimizer: OptimizerKind
    plan: MemoryPlan | None

    @property
    def share(self) -> Share:
        """This rank's share of a measurement. Ranks that share samples have one together."""
        ranks, sharing = self.ranks, self.sharing
        most = (lambda count: max(ranks.gather(count))) if sharing.measures_together else None
        return Share(part=sharing.reader(ranks.rank), parts=sharing.readers, most=most)

    @property
    def planned_gib(self) -> float | None:
        return None if self.plan is None else self.plan.footprint.gib


def setup(config: Config, ranks: Ranks = ALONE, plan: MemoryPlan | None = None) -> Setup:
    """The resolved objects of a configuration whose memory settings are settled."""
    device = resolve.device(config, ranks)
    return Setup(
        config=config, ranks=ranks, device=device, sharing=resolve.sharing(config, ranks),
        memory=resolve.memory_choice(config), budget_gib=resolve.budget_gib(config),
        compiled=resolve.compiles(config, on_gpu=device.type == "cuda"), optimizer=resolve.optimizer(config), plan=plan,
    )  # fmt: skip


def settled(config: Config, ranks: Ranks = ALONE, *, training: bool = True) -> Setup:
    """Plans the memory on the leading rank, then the setup. UserError with mends when nothing fits."""
    machines = resolve.machines(config, ranks.world)
    config, plan = ranks.lead(lambda: memory_plan.settle(config, machines=machines, training=training))
    return setup(config, ranks, plan)


def forward_only(config: Config) -> Setup:
    """The setup of a command that trains nothing, in one process: evaluate, sample.

    The strategy's name stays, because it decides the arithmetic of a full fine-tune.
    """
    return settled(resolve.for_one_process(config), training=False)
