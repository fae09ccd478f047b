"""Predicts the memory of a training step by part, and its duration, from sizes alone.

Owns the formulas and their fitted constants (docs/performance.md). No weights are loaded: the sizes come from a
transformer on the meta device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from ltx_train.memory.blocks.runner import Keep
from ltx_train.memory.planning.cards import GIB, Card
from ltx_train.memory.weights.quantize import MANY_ROWS
from ltx_train.model.reach import tokens_seen
from ltx_train.model.transformer import Transformer, transformer_widths

# Fitted constants. Memory: to 29 of the measured peaks in docs/performance/peaks.json (H200, torch 2.11), so that
# predictions are within 5 % of the reserved memory; tests/unit/test_plan.py holds 41 of 43 to it. To fit again: measure
# with docs/performance/measure.sh, add the records to peaks.json, and change the constant whose part of the footprint
# the new records vary (keep_everything for the first pair, everything recomputed for _WORKING, int8 for _DEQUANTIZED,
# memory.keep=attention for _KEPT_ATTENTION, a bare run for the reserve).
#
# In units of one block's input (tokens x width x bytes, both modalities): activations that a block keeps with
# keep_everything, for an adapter and for a full fine-tune, and working memory of the running block.
_KEPT_EVERYTHING, _KEPT_EVERYTHING_FULL = 26.6, 38.0
_WORKING = 35.0
# Dequantized weights that exist at once in a block's backward, as a share of the block's size in bfloat16.
_DEQUANTIZED = 0.75
# Share of the attention outputs that is kept: those of audio-to-video attention are recomputed.
_KEPT_ATTENTION = 0.85
# Memory that the allocator reserves beyond its allocations: GiB, and a share of the running block's memory. CUDA graphs
# have their own memory pool, to which only the share applies.
_RESERVE_GIB, _RESERVE_SHARE = 0.45, 0.15
# Rates: shares of a card's datasheet rates that kernels reach (products, attention, memory, host link), and passes of
# the elementwise kernels over a block's input. Fitted to the step times of workloads A and B in
# docs/performance/h200.json.
_LINEAR, _ATTENTION, _PASSES, _BANDWIDTH, _HOST = 0.75, 0.475, 330, 0.9, 0.95
# Seconds per block: fixed, and for launching kernels, which CUDA graphs save.
_BLOCK_OVERHEAD_S, _LAUNCHES_S = 1.0e-3, 0.7e-3
_STREAM_OVERHEAD = 0.05
# Share of the link between devices that copies reach, and bytes that the update of one weight moves in a full
# fine-tune. From docs/performance/several.json.
_PEER, _UPDATE_BYTES = 0.8, 80.0
# Seconds to accumulate, clip and update one weight in host memory. Measured: 0.68e-9 for one device with 16 processors;
# several devices share the memory's bandwidth.
_OFFLOADED_UPDATE_S = 1.0e-9
# Share of the host link left for weights while inputs travel the other way.
_BOTH_WAYS = 0.87
_BYTES_PER_WEIGHT = {"int8": 1.0, "float8": 1.0, "int4": 0.5 + 4 / 128}
_MASTER_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear layer of a block. rows: the tokens that it processes (video, audio or text)."""

    name: str
    inputs: int
    outputs: int
    rows: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a transformer in elements. block_rest: of a block outside `linears`. outside: outside the blocks."""

    layers: int
    linears: tuple[Linear, ...]
    block_rest: int
    outside: int
    width: int
    audio_width: int
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One micro-batch: number of samples, and tokens of one sample on one device, 0 for an absent modality.

    References are included. dtype_bytes: of activations. sequence: devices that share each sample's video tokens.
    """

    batch: int
    video: int
    audio: int
    text: int
    dtype_bytes: int = 2
    sequence: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWeights:
    """The trained weights and how they are optimized.

    parameters: their number. moment_bytes: the optimizer's bytes per parameter beside master and gradient.
    accumulate: micro-batches of a step. averaged: whether a moving average is kept. stage: ZeRO stage of the updates
    over `slices` devices, 0 where every device updates all weights. offloaded: the slices are in host memory, or, with
    in_files, in files.
    """

    parameters: int
    moment_bytes: float
    accumulate: int = 1
    full: bool = False
    averaged: bool = False
    stage: int = 0
    slices: int = 1
    offloaded: bool = False
    in_files: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChoice:
    """The settings that trade time for memory; the fields are those of `memory` in the configuration.

    slices: number of devices over which streamed blocks are sliced, 1 where they are in host memory.
    """

    quantize: str = "none"
    compute: str = "bf16"
    keep: Keep = Keep.inputs
    keep_everything: int = 0
    stream_blocks: int = 0
    stream_slots: int = 3
    offload_inputs: bool = False
    graphs: bool = False
    slices: int = 1


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


def sizes(transformer: Transformer) -> ModelSizes:
    """Reads the sizes of a transformer, which may be on the meta device."""
    width, audio_width = transformer_widths(transformer.config)
    block = transformer.transformer_blocks[0]
    linears = tuple(
        Linear(name=name, inputs=layer.in_features, outputs=layer.out_features, rows=tokens_seen(name))
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith("to_gate_logits")
    )
    in_linears = sum(layer.inputs * layer.outputs for layer in linears)
    in_block = sum(p.numel() for p in block.parameters())
    layers = len(transformer.transformer_blocks)
    everything = sum(p.numel() for p in transformer.parameters())
    return ModelSizes(
        layers=layers, linears=linears, block_rest=in_block - in_linears, outside=everything - layers * in_block,
        width=width, audio_width=audio_width, heads=transformer.config["num_attention_heads"],
    )  # fmt: skip


def predict(
    size: ModelSizes, work: Workload, trained: TrainedWeights, choice: MemoryChoice, *, card: Card
) -> Footprint:  # fmt: skip
    """Predicts the memory peak and the duration of a training step."""
    streamed = min(choice.stream_blocks, size.layers)
    block = _block_bytes(size, choice, work.dtype_bytes)
    resident = (size.layers - streamed) * block + size.outside * work.dtype_bytes
    frozen = 0.0 if trained.full and not trained.stage else resident
    states = 0.0 if trained.offloaded else _states(trained)
    gradients = _gradients(trained, block, work.dtype_bytes)
    unit = _unit(size, work)
    blocks_with_inputs = 4 + choice.keep_everything if choice.offload_inputs else size.layers
    inputs = min(blocks_with_inputs, size.layers) * unit
    # A block that keeps everything also keeps its dequantized weights.
    everything = _KEPT_EVERYTHING_FULL if trained.full else _KEPT_EVERYTHING
    kept = choice.keep_everything * (everything * unit + _dequantized(size, choice) / _DEQUANTIZED)
    kept_per_block = _kept_attention(size, work, choice) + _kept_products(size, work, choice)
    kept += (size.layers - choice.keep_everything) * kept_per_block
    working = _WORKING * unit + _dequantized(size, choice)
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
    offloads = size.layers - choice.keep_everything if choice.offload_inputs else 0
    host = (streamed * block if choice.slices == 1 and not trained.full else 0.0) + offloads * unit + _snapshot(trained)
    if trained.offloaded and not trained.in_files:
        host += _states(trained) + (4.0 + work.dtype_bytes) * trained.parameters / trained.slices
    seconds = _seconds(size, work, trained, choice, card=card, streamed_bytes=streamed * block)
    return Footprint(parts=parts, step_s=seconds, host=host)


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


def model_flops(size: ModelSizes, work: Workload, *, full: bool = False) -> float:
    """Floating-point operations of one step without recomputation: forward, gradients of activations, and, when all
    weights are trained (full), gradients of weights."""
    rows = {"video": work.video, "audio": work.audio, "text": work.text}
    linear = 0.0
    for layer in size.linears:
        times = (1 if layer.rows == "text" else 2) + full
        linear += times * 2.0 * work.batch * rows[layer.rows] * layer.inputs * layer.outputs
    return size.layers * (linear + 3.5 * _attention_flops(size, work))


def _block_bytes(size: ModelSizes, choice: MemoryChoice, dtype_bytes: int) -> float:
    total = float(size.block_rest * dtype_bytes)
    for layer in size.linears:
        elements = layer.inputs * layer.outputs
        if choice.compute == "fp8" and re.fullmatch(MANY_ROWS, layer.name):
            total += 2 * elements + 4 * layer.outputs
        elif choice.quantize == "none":
            total += dtype_bytes * elements
        else:
            total += _BYTES_PER_WEIGHT[choice.quantize] * elements + dtype_bytes * layer.outputs
    return total


def _unit(size: ModelSizes, work: Workload) -> float:
    """Bytes of one block's input."""
    return work.batch * (work.video * size.width + work.audio * size.audio_width) * float(work.dtype_bytes)


def _kept_attention(size: ModelSizes, work: Workload, choice: MemoryChoice) -> float:
    """Bytes of the kept outputs and log-sum-exps of the six attentions of a block."""
    if choice.keep is not Keep.attention:
        return 0.0
    has_both = work.video > 0 and work.audio > 0
    per_video = 2 * size.width + (size.audio_width if has_both else 0)
    per_audio = (3 if has_both else 2) * size.audio_width
    outputs = (work.video * per_video + work.audio * per_audio) * work.dtype_bytes
    sums = 3 * (work.video + work.audio) * size.heads * 4
    return _KEPT_ATTENTION * work.batch * (outputs + sums)


def _kept_products(size: ModelSizes, work: Workload, choice: MemoryChoice) -> float:
    """Bytes of a block's float8 outputs, which the compiler never recomputes. The last output is not needed."""
    if choice.compute != "fp8":
        return 0.0
    rows = {"video": work.video, "audio": work.audio, "text": work.text}
    layers = [c for c in size.linears if re.fullmatch(MANY_ROWS, c.name) and not c.name.endswith("ff.net.2")]
    return float(sum(rows[layer.rows] * layer.outputs for layer in layers)) * work.batch * work.dtype_bytes


def _dequantized(size: ModelSizes, choice: MemoryChoice) -> float:
    if choice.quantize == "none":
        return 0.0
    layers = [c for c in size.linears if choice.compute != "fp8" or not re.fullmatch(MANY_ROWS, c.name)]
    return _DEQUANTIZED * 2 * sum(layer.inputs * layer.outputs for layer in layers)


def _fixed(size: ModelSizes, work: Workload) -> float:
    """Bytes of rotary tables (cos and sin, own and cross-modal width), text contexts, latents and targets."""
    tables = (work.video * (size.width + size.audio_width) + work.audio * 2 * size.audio_width) * work.dtype_bytes
    contexts = work.text * (size.width + size.audio_width) * work.dtype_bytes
    latents = (work.video + work.audio) * 128 * 4 * 4
    return float(work.batch * (tables + contexts + latents))


def _seconds(
    size: ModelSizes, work: Workload, trained: TrainedWeights, choice: MemoryChoice, *, card: Card,
    streamed_bytes: float,
) -> float:  # fmt: skip
    """Seconds of a step: products and attention at the rates that kernels reach, passes over activations at memory
    bandwidth. Copies overlap with them."""
    everything = choice.keep_everything / size.layers
    linear = size.layers * _linear_seconds(size, work, choice, card, everything=everything, full=trained.full)
    forward = size.layers * _attention_flops(size, work)
    again = 0.0 if choice.keep is not Keep.inputs else 1 - everything
    attention = forward * (3.5 + again) / (card.bf16_tflops * 1e12 * _ATTENTION)
    bandwidth = card.memory_gbs * 1e9 * _BANDWIDTH
    passes = size.layers * _unit(size, work) * _PASSES / bandwidth
    overhead = size.layers * (_BLOCK_OVERHEAD_S + (0.0 if choice.graphs else _LAUNCHES_S))
    compute = linear + attention + (passes + overhead) * (1 - 0.25 * everything)
    compute += size.layers * 2 * 1.5 * _dequantized(size, choice) / _DEQUANTIZED / bandwidth
    update_s = trained.parameters / trained.slices * _OFFLOADED_UPDATE_S if trained.offloaded else 0.0
    if trained.full and not trained.offloaded:
        compute += trained.parameters / trained.slices * _UPDATE_BYTES / bandwidth
    if choice.offload_inputs:
        compute *= 1.03
    compute *= 1 + _STREAM_OVERHEAD * choice.stream_blocks / size.layers
    if choice.slices > 1:
        travelling = (2 + trained.full) * streamed_bytes * (choice.slices - 1) / choice.slices
        return max(compute, travelling / (card.peer_gbs * 1e9 * _PEER)) + update_s
    link = card.host_gbs * 1e9 * _HOST * (_BOTH_WAYS if choice.offload_inputs else 1.0)
    return max(compute, 2 * streamed_bytes / link) + update_s


def _linear_seconds(
    size: ModelSizes, work: Workload, choice: MemoryChoice, card: Card, *, everything: float, full: bool
) -> float:  # fmt: skip
    """Seconds of one block's products: forward, recomputation except the last product, gradients of inputs except text,
    and, when all weights are trained (full), gradients of weights."""
    rows = {"video": work.video, "audio": work.audio, "text": work.text}
    total = 0.0
    for layer in size.linears:
        flops = 2.0 * work.batch * rows[layer.rows] * layer.inputs * layer.outputs
        again = 0.0 if layer.name.endswith("ff.net.2") else 1 - everything
        times = 1 + again + (0 if layer.rows == "text" else 1) + full
        fp8 = choice.compute == "fp8" and card.fp8_tflops > 0 and re.fullmatch(MANY_ROWS, layer.name)
        rate = card.fp8_tflops if fp8 else card.bf16_tflops
        total += times * flops / (rate * 1e12 * _LINEAR)
    return total


def _attention_flops(size: ModelSizes, work: Workload) -> float:
    """FLOPs of one block's attention in forward: two products each for the self, text and cross-modal attentions."""
    v, a, t = work.video, work.audio, work.text
    bridges = (1 + work.sequence) * v * a  # every device has all of audio's queries
    pairs = size.width * (v * v * work.sequence + v * t) + size.audio_width * (a * a + a * t + bridges)

    return 4.0 * work.batch * pairs
