"""Fits a run into a budget: the fastest choice whose predicted peak stays within it.

Owns the search. It knows neither the configuration nor the machine: sizes, work, card and what may be
chosen are given to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ltx_train.memory.cards import Card
from ltx_train.memory.footprint import Choice, Footprint, Sizes, Trained, Work, predict
from ltx_train.memory.recompute import Keep

# A run that is so little slower keeps the weights as they are.
_WORTH_PRECISION = 1.05
# The rest of a budget covers what predictions are short of; a pass that is being recorded cannot tidy up.
_USED, _USED_RECORDED = 0.98, 0.95
_STEPS = 12


@dataclass(frozen=True, slots=True)
class Need:
    """One run: its model, its largest batch, what it trains."""

    size: Sizes
    work: Work
    trained: Trained


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be chosen; None leaves it to the plan. host_gib: of the machine, None when unknown."""

    quantize: tuple[str, ...] = ("none",)
    compute: str = "bf16"
    keep: Keep | None = None
    keep_everything: int | None = None
    stream_blocks: int | None = None
    stream_slots: int = 3
    offload_inputs: bool | None = None
    graphs: bool | None = None
    host_gib: float | None = None
    shards: int = 1


@dataclass(frozen=True, slots=True)
class Planned:
    """A choice and what it is expected to need."""

    choice: Choice
    footprint: Footprint


def choose(need: Need, allowed: Allowed, card: Card, budget_gib: float) -> Planned | None:
    """The fastest choice within the budget, or None. Weights keep their precision where that costs next to nothing."""
    best: Planned | None = None
    for quantize in allowed.quantize:
        found = _fastest(need, replace(allowed, quantize=(quantize,)), card, budget_gib)
        if found is not None and (best is None or found.footprint.step_s * _WORTH_PRECISION < best.footprint.step_s):
            best = found
    return best


def smallest(need: Need, allowed: Allowed, card: Card) -> Planned:
    """The choice that needs the least memory, whatever it costs."""
    return min(_planned(need, _choices(need, allowed), card), key=lambda p: p.footprint.gib)


def _fastest(need: Need, allowed: Allowed, card: Card, budget_gib: float) -> Planned | None:
    found = _best(_planned(need, _choices(need, allowed), card), allowed, budget_gib)
    if found is None:
        return None
    near = _best(_planned(need, _near(need, allowed, found.choice), card), allowed, budget_gib)
    return near or found


def _best(candidates: Iterator[Planned], allowed: Allowed, budget_gib: float) -> Planned | None:
    fitting = [
        planned
        for planned in candidates
        if planned.footprint.gib <= (_USED_RECORDED if planned.choice.graphs else _USED) * budget_gib
        and (allowed.host_gib is None or planned.footprint.host_gib <= allowed.host_gib)
    ]
    # Of equally fast ones the one that needs less.
    return min(fitting, key=lambda p: (round(p.footprint.step_s, 3), p.footprint.gib), default=None)


def _planned(need: Need, choices: Iterator[Choice], card: Card) -> Iterator[Planned]:
    for choice in choices:
        yield Planned(choice, predict(need.size, need.work, need.trained, choice, card))


def _choices(need: Need, allowed: Allowed) -> Iterator[Choice]:
    layers = need.size.layers
    counts = sorted({round(layers * step / _STEPS) for step in range(_STEPS + 1)})
    streams = [0] if need.trained.full else counts
    # Quantized blocks that are streamed would keep their dequantized weights, which is what streaming is to save.
    streams = [0] if allowed.keep is Keep.everything else streams
    streams = streams if allowed.stream_blocks is None else [min(allowed.stream_blocks, layers)]
    keeps = [Keep.inputs, Keep.attention] if allowed.keep is None else [allowed.keep]
    offloads = [False, True] if allowed.offload_inputs is None else [allowed.offload_inputs]
    graphs = [False, True] if allowed.graphs is None else [allowed.graphs]
    for quantize in allowed.quantize:
        for streamed in streams:
            most = layers if allowed.shards > 1 else layers - streamed
            everything = [n for n in counts if n <= most]
            if allowed.keep_everything is not None:
                everything = [min(allowed.keep_everything, most)]
            for keep in keeps:
                for kept in [layers] if keep is Keep.everything else everything:
                    for offload, graph in product(offloads, graphs):
                        yield Choice(
                            quantize,
                            allowed.compute,
                            keep,
                            kept,
                            streamed,
                            allowed.stream_slots,
                            offload,
                            graph,
                            allowed.shards,
                        )


def _near(need: Need, allowed: Allowed, found: Choice) -> Iterator[Choice]:
    """Counts of blocks between those of `_choices`, around the best of them; itself among them."""
    layers = need.size.layers
    step = -(-layers // _STEPS)
    fixed = found.keep is Keep.everything
    streams = range(found.stream_blocks - step, found.stream_blocks + step + 1)
    counts = range(found.keep_everything - step, found.keep_everything + step + 1)
    if allowed.stream_blocks is not None or need.trained.full or fixed:
        streams = [found.stream_blocks]
    if allowed.keep_everything is not None or fixed:
        counts = [found.keep_everything]
    for streamed, kept in product(streams, counts):
        most = layers if found.shards > 1 else layers - streamed
        if streamed >= 0 and 0 <= kept <= most:
            yield replace(found, stream_blocks=streamed, keep_everything=kept)
