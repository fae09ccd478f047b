"""Fits a run into a memory budget: finds the fastest choice whose predicted peak is within it.

Owns the search. Knows neither the configuration nor the machine: sizes, workload, card and constraints are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.planning.cards import Card
from ltx_train.memory.planning.footprint import Footprint, predict
from ltx_train.memory.planning.sizes import MemoryChoice, ModelSizes, TrainedWeights, Workload

# Weights keep their precision where the run is at most this much slower.
_WORTH_PRECISION = 1.05
# Usable share of a budget; the rest covers prediction errors. A pass under CUDA graph capture cannot free memory.
_USED, _USED_RECORDED = 0.98, 0.95
_STEPS = 12
# Blocks that keep different activations are two compiled graphs, of up to 30 s each: 1 % of 5,000 steps of 0.6 s.
_WORTH_A_GRAPH = 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNeed:
    """The needs of a run: sizes of its model, its largest micro-batch, its trained weights, bytes between its steps."""

    size: ModelSizes
    work: Workload
    trained: TrainedWeights
    between: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConstraints:
    """The constraints of a plan. None leaves a setting to the plan; the plan keeps an explicit value.

    host_gib: host memory of the machine, None when unknown. slices: devices over which all blocks are sliced.
    """

    quantize: tuple[str, ...] = ("none",)
    compute: str = "bf16"
    keep: Keep | None = None
    keep_everything: int | None = None
    stream_blocks: int | None = None
    stream_slots: int = 3
    offload_inputs: bool | None = None
    graphs: bool | None = None
    compiled: bool = True
    host_gib: float | None = None
    slices: int = 1


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A choice and its predicted footprint."""

    choice: MemoryChoice
    footprint: Footprint


def choose(need: StepNeed, constraints: PlanConstraints, card: Card, budget_gib: float) -> MemoryPlan | None:
    """The fastest choice within the budget, or None. A lower precision must make the step at least 5 % faster."""
    best: MemoryPlan | None = None
    for quantize in constraints.quantize:
        plan = _fastest(need, replace(constraints, quantize=(quantize,)), card, budget_gib)
        if plan is not None and (best is None or plan.footprint.step_s * _WORTH_PRECISION < best.footprint.step_s):
            best = plan
    return best


def smallest(need: StepNeed, constraints: PlanConstraints, card: Card) -> MemoryPlan:
    """The choice that needs the least memory, however slow it is."""
    return min(_predicted(need, _choices(need, constraints), card), key=lambda p: p.footprint.gib)


def _fastest(need: StepNeed, constraints: PlanConstraints, card: Card, budget_gib: float) -> MemoryPlan | None:
    coarse = _best(_predicted(need, _choices(need, constraints), card), need, constraints, budget_gib)
    if coarse is None:
        return None
    fine = _best(_predicted(need, _neighbours(need, constraints, coarse.choice), card), need, constraints, budget_gib)
    return fine or coarse


def _best(
    candidates: Iterator[MemoryPlan], need: StepNeed, constraints: PlanConstraints, budget_gib: float
) -> MemoryPlan | None:
    fitting = [
        plan
        for plan in candidates
        if plan.footprint.gib <= (_USED_RECORDED if plan.choice.graphs else _USED) * budget_gib
        and (constraints.host_gib is None or plan.footprint.host_gib <= constraints.host_gib)
    ]
    # Among equally fast plans, the one that needs the least memory.
    return min(fitting, key=lambda p: (round(_cost(p, need.size.layers), 3), p.footprint.gib), default=None)


def _cost(plan: MemoryPlan, layers: int) -> float:
    """Seconds of a step, more of them where its blocks are of two kinds."""
    has_two = plan.choice.compiled and 0 < plan.choice.keep_everything < layers
    return plan.footprint.step_s * (_WORTH_A_GRAPH if has_two else 1.0)


def _predicted(need: StepNeed, choices: Iterator[MemoryChoice], card: Card) -> Iterator[MemoryPlan]:
    for choice in choices:
        foot = predict(need.size, need.work, need.trained, choice, card=card, between=need.between)
        yield MemoryPlan(choice, foot)


def _choices(need: StepNeed, constraints: PlanConstraints) -> Iterator[MemoryChoice]:
    """A coarse grid over all settings that the constraints leave open."""
    layers = need.size.layers
    counts = sorted({round(layers * step / _STEPS) for step in range(_STEPS + 1)})
    keeps = [Keep.inputs, Keep.attention] if constraints.keep is None else [constraints.keep]
    offloads = [False, True] if constraints.offload_inputs is None else [constraints.offload_inputs]
    graphs = [False, True] if constraints.graphs is None else [constraints.graphs]
    for quantize, streamed in product(constraints.quantize, _stream_counts(need, constraints, counts)):
        for keep, kept, offload, graph in product(keeps, counts, offloads, graphs):
            choice = MemoryChoice(
                quantize=quantize, compute=constraints.compute, keep=keep, keep_everything=kept, stream_blocks=streamed,
                stream_slots=constraints.stream_slots, offload_inputs=offload, graphs=graph, slices=constraints.slices,
                compiled=constraints.compiled,
            )  # fmt: skip
            yield from _with_kept_blocks(choice, need, constraints, first=kept == counts[0])


def _stream_counts(need: StepNeed, constraints: PlanConstraints, counts: list[int]) -> list[int]:
    """The numbers of streamed blocks to try. Blocks that must keep everything are not streamed: quantized ones would
    also keep their dequantized weights, and streaming would save no memory."""
    if constraints.stream_blocks is not None:
        return [min(constraints.stream_blocks, need.size.layers)]
    return [0] if need.trained.full or constraints.keep is Keep.everything else counts


def _with_kept_blocks(
    choice: MemoryChoice, need: StepNeed, constraints: PlanConstraints, *, first: bool
) -> Iterator[MemoryChoice]:
    """Yields the choice if its number of blocks that keep everything is allowed; a fixed number only once (first).

    An explicit number stays as it is and may include streamed blocks. The plan itself lets only resident blocks keep
    everything, or all blocks when they are sliced over devices or have 8-bit products.
    """
    layers = need.size.layers
    if choice.keep is Keep.everything:
        if first:
            yield replace(choice, keep_everything=layers)
    elif constraints.keep_everything is not None:
        if first:
            yield replace(choice, keep_everything=min(constraints.keep_everything, layers))
    elif choice.keep_everything <= (
        layers if choice.slices > 1 or choice.compute != "bf16" else layers - choice.stream_blocks
    ):
        yield choice


def _neighbours(need: StepNeed, constraints: PlanConstraints, coarse: MemoryChoice) -> Iterator[MemoryChoice]:
    """Choices around the best coarse one, with block counts between those of `_choices`. Includes the coarse choice."""
    layers = need.size.layers
    step = -(-layers // _STEPS)
    fixed = coarse.keep is Keep.everything
    streams = range(coarse.stream_blocks - step, coarse.stream_blocks + step + 1)
    counts = range(coarse.keep_everything - step, coarse.keep_everything + step + 1)
    if constraints.stream_blocks is not None or need.trained.full or fixed:
        streams = [coarse.stream_blocks]
    if constraints.keep_everything is not None or fixed:
        counts = [coarse.keep_everything]
    for streamed, kept in product(streams, counts):
        choice = replace(coarse, stream_blocks=streamed, keep_everything=kept)
        if 0 <= streamed <= layers and kept >= 0:
            yield from _with_kept_blocks(choice, need, constraints, first=True)
