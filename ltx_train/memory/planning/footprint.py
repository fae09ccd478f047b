"""Predicts the memory of a training step by part, from sizes alone.

Owns the formulas and their fitted constants (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.planning.cards import GIB, Card
from ltx_train.memory.planning.duration import seconds
from ltx_train.memory.planning.sizes import (
    MemoryChoice,
    ModelSizes,
    TrainedWeights,
    Workload,
    dequantized_elements,
    unit_bytes,
)

# Fitted constants. Memory: to a part of the measured peaks in docs/performance/peaks.json (H200, torch 2.11), so that
# predictions are within 5 % of the reserved memory; tests/unit/test_plan.py holds 43 of 46 to it. To fit again: measure
# with docs/performance/measure.sh, add the records to peaks.json, and change the constant whose part of the footprint
# the new records vary (keep_everything for the first pair, everything recomputed for _WORKING, int8 for _DEQUANTIZED,
# a bare run for the reserve).
#
# In units of one block's input (tokens x width x bytes, both modalities): activations that a block keeps with
# keep_everything, for an adapter and for a full fine-tune, and working memory of the running block.
_KEPT_EVERYTHING, _KEPT_EVERYTHING_FULL = 26.6, 38.0
_WORKING = 35.0
# The same for the codes of 8-bit products, and for the inputs and gradients that they are made of.
_WORKING_CODES = 11.0
# The running block of a command that trains nothing, its dequantized weights included, compiled and not: the rows of
# `sample` in docs/performance/encoders.json.
_WORKING_FORWARD, _WORKING_FORWARD_EAGER = 8.8, 24.8
# Dequantized weights that exist at once in a block's backward, as a share of the block's size in bfloat16.
_DEQUANTIZED = 0.75
# Memory that the allocator reserves beyond its allocations: GiB, and a share of the running block's memory. CUDA graphs
# have their own memory pool, to which only the share applies.
_RESERVE_GIB, _RESERVE_SHARE = 0.45, 0.15
# What DeepSpeed's ZeRO-3 reserves beyond the parts that it shares with the own engine: GiB of buckets, where reductions
# overlap (not under offload), and a share of those parts. Fitted to three full fine-tunes in
# docs/performance/deepspeed.json; the three measured later are within 5 % too.
_ENGINE_GIB, _ENGINE_SHARE = 5.5, 0.05
_BYTES_PER_WEIGHT = {"int8": 1.0, "float8": 1.0, "int4": 0.5 + 4 / 128}
_MASTER_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by part at the memory peak, the predicted seconds of a step on a card, and bytes of host memory."""

    parts: dict[str, float] = field(default_factory=dict[str, float])
    step_s: float = 0.0
    host: float = 0.0

    @property
    def gib(self) -> float:
        return sum(self.parts.values()) / GIB

    @property
    def host_gib(self) -> float:
        return self.host / GIB


def predict(
    size: ModelSizes, work: Workload, trained: TrainedWeights, choice: MemoryChoice, *, card: Card, between: float = 0.0
) -> Footprint:  # fmt: skip
    """Predicts the memory peak and the duration of a training step. between: bytes that are needed between steps."""
    streamed = min(choice.stream_blocks, size.layers)
    block = _block_bytes(size, choice, work.dtype_bytes)
    resident = (size.layers - streamed) * block + size.outside * work.dtype_bytes
    frozen = 0.0 if trained.full and not trained.stage else resident
    states = 0.0 if trained.offloaded else _states(trained)
    gradients = _gradients(trained, block, work.dtype_bytes)
    unit = unit_bytes(size, work)
    blocks_with_inputs = 4 + choice.keep_everything if choice.offload_inputs else size.layers
    is_forward = trained.parameters == 0
    inputs = 0.0 if is_forward else min(blocks_with_inputs, size.layers) * unit
    # A block that keeps everything also keeps its dequantized weights.
    everything = _KEPT_EVERYTHING_FULL if trained.full else _KEPT_EVERYTHING
    kept = choice.keep_everything * (everything * unit + 2.0 * dequantized_elements(size, choice))
    kept += (size.layers - choice.keep_everything) * _kept_attention(size, work, choice)
    if is_forward:
        kept = 0.0  # nothing waits for a backward pass
    working_units = _WORKING + (_WORKING_CODES if choice.compute != "bf16" else 0.0)
    backward = working_units * unit + _DEQUANTIZED * 2.0 * dequantized_elements(size, choice)
    backward += _transposed(size, choice)
    forward = (_WORKING_FORWARD if choice.compiled else _WORKING_FORWARD_EAGER) * unit
    working = forward if is_forward else backward
    always = trained.accumulate > 1 or choice.graphs or trained.stage > 0
    early = inputs + kept + (gradients if always else 0)
    parts = {
        "weights" if trained.full else "frozen weights": frozen,
        "slices of streamed weights": streamed * block / choice.slices if choice.slices > 1 else 0.0,
        "ring of streamed weights": min(choice.stream_slots, streamed) * block,
        "trained weights and moments": states,
        "inputs, positions, contexts": _fixed(size, work),
        "one block at work": working,
        "kept for backward": inputs + kept if early >= gradients else 0.0,
        "gradients": gradients if early < gradients or always else 0.0,
        "allocator's reserve": (0.0 if choice.graphs else _RESERVE_GIB * GIB) + _RESERVE_SHARE * working,
    }
    if trained.by_hooks:
        second = work.dtype_bytes * trained.parameters / trained.second_slices if trained.second_slices > 1 else 0.0
        parts["second slice of the weights"] = second
        overlapping = 0.0 if trained.offloaded else _ENGINE_GIB * GIB
        parts["DeepSpeed's buffers"] = overlapping + _ENGINE_SHARE * sum(parts.values())
    parts["generated clips' decoders"] = max(0.0, between - _free_between(parts))
    offloads = size.layers - choice.keep_everything if choice.offload_inputs and not is_forward else 0
    host = (streamed * block if choice.slices == 1 and not trained.full else 0.0) + offloads * unit + _snapshot(trained)
    if trained.offloaded and not trained.in_files:
        host += _states(trained) + (4.0 + work.dtype_bytes) * trained.parameters / trained.slices
    step_s = seconds(size, work, trained, choice, card=card, streamed_bytes=streamed * block)
    return Footprint(parts=parts, step_s=step_s, host=host)


def _free_between(parts: dict[str, float]) -> float:
    """Bytes of a step that other work has between steps. CUDA graphs are released before it."""
    return parts["one block at work"] + parts["kept for backward"] + parts["allocator's reserve"]


def _states(trained: TrainedWeights) -> float:
    """Bytes of masters, moments, the moving average, and the full weights of an adapter beside sliced masters."""
    shared = trained.parameters * (_MASTER_BYTES + trained.moment_bytes) / trained.slices
    copies = trained.averaged + (trained.stage > 0 and not trained.full)
    return shared + 4.0 * trained.parameters * copies


def _snapshot(trained: TrainedWeights) -> float:
    """Bytes of the host memory for a save's copy of masters and moments. It stays allocated after the first save."""
    return trained.parameters * (_MASTER_BYTES + trained.moment_bytes) / (trained.slices if trained.full else 1)


def _gradients(trained: TrainedWeights, block: float, dtype_bytes: int) -> float:
    """Bytes of gradients: float32, or with a ZeRO stage a float32 slice and the buffers that it is reduced from."""
    if not trained.stage:
        return 4.0 * trained.parameters
    share = 0.0 if trained.offloaded else 4.0 * trained.parameters / trained.slices
    if not trained.full:
        return share + 4.0 * trained.parameters
    return share + (3 * block + trained.parameters * dtype_bytes if trained.stage == 1 else 4 * block)


def _block_bytes(size: ModelSizes, choice: MemoryChoice, dtype_bytes: int) -> float:
    total = float(size.block_rest * dtype_bytes)
    for layer in size.linears:
        elements = layer.inputs * layer.outputs
        if choice.compute != "bf16" and layer.many_rows:
            total += elements + 4 * layer.outputs
        elif choice.quantize == "none":
            total += dtype_bytes * elements
        else:
            total += _BYTES_PER_WEIGHT[choice.quantize] * elements + dtype_bytes * layer.outputs
    return total


def _kept_attention(size: ModelSizes, work: Workload, choice: MemoryChoice) -> float:
    """Bytes of the kept outputs and log-sum-exps of a block's self-attentions."""
    if choice.keep is not Keep.attention:
        return 0.0
    outputs = (work.video * size.width + work.audio * size.audio_width) * work.dtype_bytes
    return work.batch * (outputs + 4.0 * (work.video + work.audio) * size.heads)


def _transposed(size: ModelSizes, choice: MemoryChoice) -> float:
    """Bytes of the largest weight of an 8-bit product, which the input gradient copies in the other layout."""
    if choice.compute == "bf16":
        return 0.0
    return float(max((c.inputs * c.outputs for c in size.linears if c.many_rows), default=0))


def _fixed(size: ModelSizes, work: Workload) -> float:
    """Bytes of rotary tables (cos and sin, own and cross-modal width), text contexts, latents and targets."""
    tables = (work.video * (size.width + size.audio_width) + work.audio * 2 * size.audio_width) * work.dtype_bytes
    contexts = work.text * (size.width + size.audio_width) * work.dtype_bytes
    latents = (work.video + work.audio) * 128 * 4 * 4
    return float(work.batch * (tables + contexts + latents))
