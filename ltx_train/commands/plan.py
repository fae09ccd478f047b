"""`ltx-train plan`: what will fit, before anything is loaded; for this machine's GPU or any card by name."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ltx_train.commands import planning, session, summary
from ltx_train.commands.planning import Place
from ltx_train.config import Config
from ltx_train.contracts import Exit, UserError
from ltx_train.memory.cards import CARDS, GIB, card_by_name
from ltx_train.memory.footprint import Choice
from ltx_train.memory.plan import Planned


def run(config: Config) -> int:
    """One card in detail, or all known ones in a table; a UserError with mends when the card is too small."""
    place = _place(config)
    if place is None:
        _overview(config)
        return Exit.DONE
    found = planning.planned(config, place)
    if found is None:
        raise UserError(planning.refusal(config, place))
    _detail(place, found)
    return Exit.DONE


def _place(config: Config) -> Place | None:
    if config.plan.card is not None:
        card = card_by_name(config.plan.card)
        return Place(card, config.memory.budget_gib or card.budget_gib, None)
    return planning.here(config) if session.device(config).type == "cuda" or config.memory.budget_gib else None


def _overview(config: Config) -> None:
    table = Table("card", "to use", "peak", "step", "host", "how")
    for card in CARDS:
        place = Place(card, config.memory.budget_gib or card.budget_gib, None)
        found = planning.planned(config, place)
        if found is None and config.memory.quantize == "none" and config.adapter.kind == "lora":
            found = planning.planned(replace(config, memory=replace(config.memory, quantize="int8")), place)
        budget = f"{place.budget_gib:.0f} GiB"
        if found is None:
            table.add_row(card.name, budget, "", "", "", "does not fit: ltx-train plan plan.card=... says why")
            continue
        foot = found.footprint
        table.add_row(
            card.name, budget, f"{foot.gib:.1f} GiB", f"{foot.step_s:.2f} s", f"{foot.host_gib:.0f} GiB",
            summary.how(found.choice),
        )  # fmt: skip
    Console(width=160).print(table)


def _detail(place: Place, found: Planned) -> None:
    foot = found.footprint
    table = Table("at the peak", "GiB", title=f"{place.card.name}, {place.budget_gib:.1f} GiB to use")
    for name, size in foot.parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("predicted peak", f"{foot.gib:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"about {foot.step_s:.2f} s a step; {foot.host_gib:.1f} GiB of host memory besides the program's own")
    console.print(overrides(found.choice), soft_wrap=True)


def overrides(choice: Choice) -> str:
    """A choice as the overrides that fix it."""
    values = {
        "quantize": choice.quantize,
        "compute": choice.compute if choice.compute != "bf16" else None,
        "keep": choice.keep.value,
        "keep_everything": choice.keep_everything,
        "stream_blocks": choice.stream_blocks if choice.shards == 1 else None,
        "offload_inputs": str(choice.offload_inputs).lower(),
        "graphs": str(choice.graphs).lower(),
    }
    return " ".join(f"memory.{name}={value}" for name, value in values.items() if value is not None)
