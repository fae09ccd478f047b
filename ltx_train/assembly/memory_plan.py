"""From the configuration and the machine to a memory plan: settled memory settings, or a refusal with mends."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

import torch

from ltx_train.assembly import encoder_plan, from_config, mends, model_source, resolve
from ltx_train.config import Config
from ltx_train.contracts import UserError
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.planning import network, search
from ltx_train.memory.planning.cards import GIB, Card, card_by_name, card_of_device
from ltx_train.memory.planning.network import Traffic
from ltx_train.memory.planning.search import MemoryPlan, PlanConstraints, StepNeed
from ltx_train.memory.planning.sizes import TrainedWeights, sizes
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer

# Share of host memory that weights and activations may take; the rest is left to the machine.
HOST_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where a run is to fit: on `machines` of strategy.devices processes each. host_gib: host memory for one process of
    this machine, None when another machine is planned for."""

    card: Card
    budget_gib: float
    host_gib: float | None
    machines: int = 1


def settle(config: Config, *, machines: int = 1, training: bool = True) -> tuple[Config, MemoryPlan | None]:
    """The configuration with every planned setting decided; UserError with mends when nothing fits.

    On a CPU without a budget nothing is planned and the plain settings hold.
    """
    on_cpu = resolve.device(config).type != "cuda"
    if on_cpu and training and resolve.memory_choice(config).graphs:
        raise UserError("memory.graphs=true records work of a GPU, and this run is on the CPU: leave it out")
    if on_cpu or not training:
        config = resolve.without_graphs(config)
    room = here(config, machines)
    if room is None:
        return resolve.with_choice(config, resolve.memory_choice(config)), None
    plan = plan_for(config, room, training=training)
    if plan is None:
        raise UserError(refusal(config, room, training=training))
    return resolve.with_choice(config, plan.choice), plan


def plan_for(config: Config, room: Room, *, training: bool = True) -> MemoryPlan | None:
    """The plan for a room, or None when nothing fits. training: otherwise a command that runs the model forward, in one
    process."""
    needed, constraints = _problem(config, room, training=training)
    _report_excess(constraints, needed.size.layers)
    return search.choose(needed, constraints, room.card, room.budget_gib)


def _problem(config: Config, room: Room, *, training: bool) -> tuple[StepNeed, PlanConstraints]:
    """What has to fit, and what the search may choose."""
    machines = room.machines if training else 1
    if not training:
        config = resolve.for_one_process(config)
    needed, sharing = need(config, machines), resolve.sharing(config, on_machines=machines)
    constraints = resolve.plan_constraints(config, room.host_gib)
    if not training:
        needed = replace(needed, trained=TrainedWeights(parameters=0, moment_bytes=0.0))
        constraints = replace(constraints, keep=Keep.inputs, keep_everything=0, offload_inputs=True)
    elif sharing.block_slices > 1:
        constraints = replace(constraints, stream_blocks=needed.size.layers, slices=sharing.block_slices)
    if sharing.offload is not None or sharing.sequence > 1 or sharing.hooks_passes:
        constraints = replace(constraints, graphs=False)
    return needed, constraints


_reported: set[str] = set()


def _report_excess(constraints: PlanConstraints, layers: int) -> None:
    """An explicit number of blocks beyond the model's means all of them. One message names it."""
    for name, value in (("stream_blocks", constraints.stream_blocks), ("keep_everything", constraints.keep_everything)):
        text = f"ltx-train: memory.{name}={value}: the model has {layers} blocks, all of them are taken"
        if value is not None and value > layers and text not in _reported:
            _reported.add(text)
            print(text, file=sys.stderr)


def here(config: Config, machines: int = 1) -> Room | None:
    """This machine's GPU and the budget on it, as that of each machine. On a CPU a given budget is planned for as if it
    were a GPU's."""
    device, budget_gib = resolve.device(config), resolve.budget_gib(config)
    processes = resolve.launch(config).processes
    each_gib = host_gib() * HOST_SHARE / processes
    if device.type != "cuda":
        if budget_gib is None:
            return None
        return Room(
            card=card_by_name(config.plan.card or "RTX 4090"),
            budget_gib=budget_gib,
            host_gib=each_gib,
            machines=machines,
        )
    free, total = torch.cuda.mem_get_info(device)
    card = card_of_device(torch.cuda.get_device_properties(device).name, total / GIB)
    budget_gib = budget_gib or (free + torch.cuda.memory_reserved(device)) / GIB
    return Room(card=card, budget_gib=budget_gib, host_gib=each_gib, machines=machines)


def host_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def need(config: Config, machines: int = 1) -> StepNeed:
    """Sizes from the meta device; the largest bucket's tokens; the decoders of generated clips."""
    skeleton = model_source.skeleton(config)
    trained = trained_weights(config, skeleton, machines)
    between = encoder_plan.between_steps_gib(config) * GIB
    return StepNeed(size=sizes(skeleton), work=resolve.workload(config), trained=trained, between=between)


def traffic(config: Config, machines: int) -> Traffic:
    """What a step of the run on `machines` sends between them."""
    needed, sharing = need(config, machines), resolve.sharing(config, on_machines=machines)
    return network.traffic(
        needed.trained, sharing.world, dtype_bytes=needed.work.dtype_bytes,
        gathers_within=sharing.hpz == sharing.local_world > 1,
    )  # fmt: skip


def refusal(config: Config, room: Room, *, training: bool = True) -> str:
    """Why a run, or a command that runs the model forward, does not fit, and the cheapest changes that make it fit."""
    needed, constraints = _problem(config, replace(room, host_gib=None), training=training)
    least = search.smallest(needed, constraints, room.card).footprint
    lines = [
        f"this {'run' if training else 'command'} does not fit into {room.budget_gib:.1f} GiB on {room.card.name}: "
        f"with these settings it needs at least {least.gib:.1f} GiB"
        + (f" and {least.host_gib:.0f} GiB of host memory" if least.host_gib > 1 else "")
    ]
    cheapest = mends.cheapest(config, lambda changed: plan_for(changed, room, training=training), training=training)
    if cheapest:
        lines += ["the cheapest changes that make it fit:", *(f"  {mend}" for mend in cheapest)]
    else:
        lines.append("no setting of this release makes it fit: it needs a larger card")
    return "\n".join(lines)


def out_of_memory(config: Config, plan: MemoryPlan | None) -> str:
    """The message when the GPU ran out after all: the prediction was wrong, or other processes use the card."""
    room = here(config)
    if room is None:
        return "the device ran out of memory"
    predicted = "" if plan is None else f" (planned: {plan.footprint.gib:.1f} GiB)"
    used = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0
    tighter = replace(room, budget_gib=min(room.budget_gib, used or room.budget_gib) * 0.9)
    lines = [
        f"the GPU ran out of memory at {used:.1f} of {room.budget_gib:.1f} GiB{predicted}; saved checkpoints are "
        "unharmed",
        f"ways to need less, beginning with memory.budget_gib={tighter.budget_gib:.1f}:",
    ]
    cheapest = mends.cheapest(config, lambda changed: plan_for(changed, tighter))
    return "\n".join([*lines, *(f"  {mend}" for mend in cheapest)])


def trained_weights(config: Config, skeleton: Transformer, machines: int = 1) -> TrainedWeights:
    """What is optimized, from a transformer on the meta device."""
    shared = resolve.sharing(config, on_machines=machines)
    if shared.full:
        count = sum(p.numel() for p in skeleton.parameters())
    else:
        lora = from_config.lora(config)
        names = set(adapter.matched_modules(skeleton, lora.targets, lora.modes))
        layers = [(name, module) for name, module in skeleton.named_modules() if name in names]
        count = sum(lora.rank_of(name) * adapter.inputs_and_outputs(layer) for name, layer in layers)
    return TrainedWeights(
        parameters=count, moment_bytes=resolve.optimizer(config).moment_bytes, accumulate=_accumulated(config, shared),
        full=shared.full, averaged=config.adapter.ema > 0, stage=shared.update_stage, slices=shared.update_slices,
        offloaded=shared.offload is not None, in_files=shared.offload not in (None, "cpu"),
        by_hooks=shared.hooks_passes and shared.update_stage == 3, second_slices=shared.hpz,
    )  # fmt: skip


def _accumulated(config: Config, shared: resolve.Sharing) -> int:
    """Micro-batches of an optimizer step as far as known before the processes are started."""
    readers = max(1, shared.readers)
    return max(1, (config.optim.global_batch or 1) // (config.optim.batch_size * readers))
