"""`ltx-train plan`: predicts what fits before anything is loaded, on this machine's GPU or any card by name."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ltx_train import config as configuration
from ltx_train.assembly import encoder_plan, footage_plan, memory_plan, resolve, summary
from ltx_train.assembly.closing import close
from ltx_train.assembly.memory_plan import Room
from ltx_train.config import Config
from ltx_train.config.rules import STORED_AS
from ltx_train.contracts import Exit, UserError
from ltx_train.memory.planning.cards import CARDS, GIB, Card, card_by_name
from ltx_train.memory.planning.search import MemoryPlan
from ltx_train.memory.planning.sizes import MemoryChoice

# Share of a step's time below which 8-bit products are named.
_WORTH_OFFERING = 0.9
# What 8-bit products change of the held-out loss of a trained tiny model, in percent with the half width of its 95 %
# interval: docs/performance/quantization.json.
_PRICES = {"fp8": (-0.01, 0.14), "int8": (0.00, 0.03)}
# Machines in the table of clusters, beside those of `cluster.nodes`.
_CLUSTERS = (2, 8, 64)


def run(config: Config) -> int:
    """Prints one card in detail, or a table of all known cards. UserError names fixes when the card is too small."""
    if config.plan.clips is not None:
        return _footage(config, config.plan.clips)
    if config.cluster.nodes > 1:
        config = resolve.for_job(config, config.cluster.nodes, config.cluster.devices)
    room = _room(config)
    if room is None:
        _overview(config)
        close(None, 'ltx-train plan ... plan.card="RTX 4090" (one card in detail)')
        return Exit.DONE
    plan = memory_plan.plan_for(config, room)
    if plan is None:
        raise UserError(memory_plan.refusal(config, room))
    _detail(config, room, plan)
    _offer(config, room, plan)
    memory = encoder_plan.within(config, room.budget_gib)
    print(encoder_plan.description(memory, has_text=config.model.text_encoder is not None))
    if resolve.spans_machines(config):
        _network(config, plan)
    print(overrides(plan.choice))
    close(None, "ltx-train fit ... (it plans by itself; the line above fixes this plan)")
    return Exit.DONE


def _footage(config: Config, clips: int) -> int:
    """What a data set takes."""
    table = Table(show_header=False)
    for name, value in footage_plan.rows(config, clips):
        table.add_row(name, value)
    Console(width=120).print(table)
    close(None, "ltx-train prepare ... data.source=... data.root=...")
    return Exit.DONE


def _room(config: Config) -> Room | None:
    if config.plan.card is not None:
        return _room_on(config, card_by_name(config.plan.card))
    is_here = resolve.device(config).type == "cuda" or resolve.budget_gib(config) is not None
    return memory_plan.here(config, config.cluster.nodes) if is_here else None


def _room_on(config: Config, card: Card) -> Room:
    budget_gib = resolve.budget_gib(config) or card.budget_gib
    own = config.plan
    if own.host_gbs is not None:
        card = replace(card, host_gbs=own.host_gbs)
    processes = resolve.launch(config).processes
    host_gib = None if own.host_gib is None else own.host_gib * memory_plan.HOST_SHARE / processes
    return Room(card=card, budget_gib=budget_gib, host_gib=host_gib, machines=config.cluster.nodes)


def _overview(config: Config) -> None:
    price = [] if config.plan.price_per_hour is None else ["cost"]
    table = Table("card", "to use", "peak", "step", "whole run", *price, "host", "how")
    quantize, compute = resolve.precision(config)
    for card in CARDS:
        room = _room_on(config, card)
        plan = memory_plan.plan_for(config, room)
        if plan is None and (quantize, compute) == ("none", "bf16") and not resolve.trains_all_weights(config):
            plan = memory_plan.plan_for(configuration.changed(config, {"memory.quantize": "int8"}), room)
        budget = f"{room.budget_gib:.0f} GiB"
        if plan is None:
            why = "does not fit: ltx-train plan plan.card=... gives the reason"
            table.add_row(card.name, budget, "", "", "", *("" for _ in price), "", why)
            continue
        foot = plan.footprint
        table.add_row(
            card.name, budget, f"{foot.gib:.1f} GiB", f"{foot.step_s:.2f} s", *_whole(config, foot.step_s),
            f"{foot.host_gib:.0f} GiB", summary.how(plan.choice),
        )  # fmt: skip
    Console(width=160).print(table)
    print(_host())


def _whole(config: Config, step_s: float) -> list[str]:
    """Duration of the training steps of a run without measuring, and its cost where a price is given."""
    hours, price = config.optim.steps * step_s / 3600, config.plan.price_per_hour
    devices = resolve.launch(config).processes * config.cluster.nodes
    return [f"{hours:.1f} h", *([] if price is None else [f"{hours * price * devices:,.2f}"])]


def _host(needed_gib: float = 0.0) -> str:
    """The memory of this machine, which the column `host` compares with."""
    own_gib = memory_plan.host_gib()
    missing = ", which is not enough" if needed_gib > own_gib else ""
    return f"host memory is counted beside the program's own few GiB; this machine has {own_gib:.0f} GiB{missing}"


def _detail(config: Config, room: Room, plan: MemoryPlan) -> None:
    foot = plan.footprint
    table = Table("at the peak", "GiB", title=f"{room.card.name}, {room.budget_gib:.1f} GiB to use")
    for name, size in foot.parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("predicted peak", f"{foot.gib:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"about {foot.step_s:.2f} s a step; {foot.host_gib:.1f} GiB of host memory besides the program's own")
    hours, *cost = _whole(config, foot.step_s)
    costs = f", {cost[0]} at plan.price_per_hour={config.plan.price_per_hour:g}" if cost else ""
    console.print(f"{config.optim.steps} steps without measuring: {hours}{costs}")
    console.print(_host(foot.host_gib))


def _offer(config: Config, room: Room, plan: MemoryPlan) -> None:
    """Names 8-bit products and their price where the plan is clearly faster with them. They are no default: their price
    for the large model was not measured."""
    if resolve.precision(config)[1] != "bf16" or resolve.trains_all_weights(config):
        return
    rates = {"fp8": room.card.fp8_tflops, "int8": room.card.int8_tops}
    for compute, stored in STORED_AS.items():
        words = {"memory.compute": compute, "memory.quantize": stored}
        other = memory_plan.plan_for(configuration.changed(config, words), room) if rates[compute] else None
        if other is not None and other.footprint.step_s < _WORTH_OFFERING * plan.footprint.step_s:
            shown = " ".join(f"{name}={value}" for name, value in words.items())
            print(f"about {other.footprint.step_s:.2f} s a step with {shown}")
            print(f"  measured on a tiny model: held-out loss {_PRICES[compute][0]:+.2f} ± {_PRICES[compute][1]:.2f} %")


def _network(config: Config, plan: MemoryPlan) -> None:
    """What a step sends between machines, and its duration, for clusters of several sizes."""
    links = config.plan.link_gbs
    headings = [f"step at {link:g} GB/s" for link in links]
    table = Table("machines", "GPUs", "into each machine, a step", *headings, title="over several machines")
    for machines in sorted({*_CLUSTERS, config.cluster.nodes} - {1}):
        sent = memory_plan.traffic(config, machines)
        steps = [f"{sent.step_s(plan.footprint.step_s, link):.2f} s" for link in links]
        gpus = machines * resolve.launch(config).processes
        table.add_row(str(machines), str(gpus), f"{sent.total / 1e9:.1f} GB", *steps)
    Console(width=120).print(table)


def overrides(choice: MemoryChoice) -> str:
    """The command-line overrides that select a choice."""
    values = {
        "quantize": choice.quantize,
        "compute": choice.compute if choice.compute != "bf16" else None,
        "keep": choice.keep.value,
        "keep_everything": choice.keep_everything,
        "stream_blocks": choice.stream_blocks if choice.slices == 1 else None,
        "offload_inputs": str(choice.offload_inputs).lower(),
        "graphs": str(choice.graphs).lower(),
    }
    return " ".join(f"memory.{name}={value}" for name, value in values.items() if value is not None)
