"""Predicts the duration of a training step, from sizes and a card's datasheet.

Owns the formulas and their fitted constants (docs/performance.md). What several machines send is `network`'s.
"""

from __future__ import annotations

import math

from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.planning.cards import Card
from ltx_train.memory.planning.sizes import (
    MemoryChoice,
    ModelSizes,
    TrainedWeights,
    Workload,
    dequantized_elements,
    unit_bytes,
)

# Rates: shares of a card's datasheet rates that kernels reach (products, attention, memory, host link), and passes of
# the elementwise kernels over a block's input. Fitted to the step times of workloads A and B in
# docs/performance/h200.json.
_LINEAR, _ATTENTION, _PASSES, _BANDWIDTH, _HOST = 0.75, 0.475, 330, 0.9, 0.95
# 8-bit products, the codes of their inputs and the rotation of int8's included: from A_fp8_* and A_int8mm_22gib.
_FLOAT8, _INT8 = 0.71, 0.55
# Seconds per block: fixed, and for launching kernels, which CUDA graphs save.
_BLOCK_OVERHEAD_S, _LAUNCHES_S = 1.0e-3, 0.7e-3
# Seconds per block that the host needs to launch a step with 8-bit products, longer than a fast device computes:
# A_fp8_12gib without CUDA graphs took 1.10 and 1.30 s on two hosts, 0.67 s with them. Combined as a hypotenuse and not
# as a maximum, so that of two plans the one that computes less stays the faster one.
_CODED_LAUNCHES_S = 21.0e-3
# Shares of a step that copies of weights and of inputs cost the kernels beside them.
_STREAM_OVERHEAD, _OFFLOAD_OVERHEAD = 0.01, 0.01
# Bytes moved for each weight that is dequantized in a step.
_DEQUANTIZED_BYTES = 4.0
# Share of a step that its forward pass takes where blocks are recomputed, from the stalls of A_fp8_12gib, A_fp8_8gib.
# Streamed weights travel once in each pass, and a pass waits for its own.
_FORWARD = 0.29
# Share of the link between devices that copies reach, and bytes that the update of one weight moves in a full
# fine-tune. From docs/performance/several.json.
_PEER, _UPDATE_BYTES = 0.8, 80.0
# Seconds to accumulate, clip and update one weight in host memory. Measured: 0.68e-9 for one device with 16 processors;
# several devices share the memory's bandwidth.
_OFFLOADED_UPDATE_S = 1.0e-9
# Bytes a second that an optimizer state in files is read and written with: a step of docs/performance/deepspeed.json
# (offload_nvme), on a disk that writes 1.4e9. The disk of another machine can be several times faster or slower.
_FILES_BYTES_S = 1.8e9
# Share of the host link left for weights while inputs travel the other way.
_BOTH_WAYS = 0.95


def seconds(
    size: ModelSizes, work: Workload, trained: TrainedWeights, choice: MemoryChoice, *, card: Card,
    streamed_bytes: float,
) -> float:  # fmt: skip
    """Seconds of a step: products and attention at the rates that kernels reach, passes over activations at memory
    bandwidth. Copies overlap with them."""
    everything = choice.keep_everything / size.layers
    linear = size.layers * _linear_seconds(size, work, choice, card, everything=everything, full=trained.full)
    own, others = _attention_flops(size, work)
    again = 1 - everything
    attention = size.layers * (own * (3.5 + again * (choice.keep is Keep.inputs)) + others * (3.5 + again))
    attention /= card.bf16_tflops * 1e12 * _ATTENTION
    bandwidth = card.memory_gbs * 1e9 * _BANDWIDTH
    passes = size.layers * unit_bytes(size, work) * _PASSES / bandwidth
    overhead = size.layers * (_BLOCK_OVERHEAD_S + (0.0 if choice.graphs else _LAUNCHES_S))
    compute = linear + attention + (passes + overhead) * (1 - 0.25 * everything)
    compute += size.layers * _DEQUANTIZED_BYTES * dequantized_elements(size, choice) / bandwidth
    update_s = _offloaded_update_s(trained) if trained.offloaded else 0.0
    if trained.full and not trained.offloaded:
        compute += trained.parameters / trained.slices * _UPDATE_BYTES / bandwidth
    compute *= 1 + _STREAM_OVERHEAD * choice.stream_blocks / size.layers + _OFFLOAD_OVERHEAD * choice.offload_inputs
    if choice.compute != "bf16" and not choice.graphs and trained.parameters:
        compute = math.hypot(compute, size.layers * _CODED_LAUNCHES_S)
    if choice.slices > 1:
        travelling = (2 + trained.full) * streamed_bytes * (choice.slices - 1) / choice.slices
        return max(compute, travelling / (card.peer_gbs * 1e9 * _PEER)) + update_s
    link = card.host_gbs * 1e9 * _HOST * (_BOTH_WAYS if choice.offload_inputs else 1.0)
    # A pass begins with the last blocks of the pass before in the ring.
    fetched = max(0, choice.stream_blocks - choice.stream_slots) / max(1, choice.stream_blocks)
    copies_s, forward_s = fetched * streamed_bytes / link, compute * _FORWARD
    stall_s = sum(max(0.0, copies_s - pass_s) for pass_s in (forward_s, compute - forward_s))
    return compute + stall_s + update_s


def _offloaded_update_s(trained: TrainedWeights) -> float:
    """Seconds in which a device updates its slice in host memory or in files. The devices of a machine share its
    disk."""
    own = trained.parameters / trained.slices
    if not trained.in_files:
        return own * _OFFLOADED_UPDATE_S
    beside = trained.second_slices if trained.second_slices > 1 else trained.slices
    read_and_written = 2 * (4 + trained.moment_bytes) * own * beside
    return max(own * _OFFLOADED_UPDATE_S, read_and_written / _FILES_BYTES_S)


def model_flops(size: ModelSizes, work: Workload, *, full: bool = False) -> float:
    """Floating-point operations of one step without recomputation: forward, gradients of activations, and, when all
    weights are trained (full), gradients of weights."""
    rows = {"video": work.video, "audio": work.audio, "text": work.text}
    linear = 0.0
    for layer in size.linears:
        times = (1 if layer.rows == "text" else 2) + full
        linear += times * 2.0 * work.batch * rows[layer.rows] * layer.inputs * layer.outputs
    return size.layers * (linear + 3.5 * sum(_attention_flops(size, work)))


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
        total += times * flops / _rate(card, choice.compute if layer.many_rows else "bf16")
    return total


def _rate(card: Card, compute: str) -> float:
    """Operations a second of products. A card without the arithmetic counts with bf16's; it is refused elsewhere."""
    by_compute = {"bf16": card.bf16_tflops * _LINEAR, "fp8": card.fp8_tflops * _FLOAT8, "int8": card.int8_tops * _INT8}
    return (by_compute[compute] or by_compute["bf16"]) * 1e12


def _attention_flops(size: ModelSizes, work: Workload) -> tuple[float, float]:
    """FLOPs of one block's attention in forward, two products each: self-attention; text and cross-modal attention."""
    v, a, t = work.video, work.audio, work.text
    bridges = (1 + work.sequence) * v * a  # every device has all of audio's queries
    own = size.width * v * v * work.sequence + size.audio_width * a * a
    others = size.width * v * t + size.audio_width * (a * t + bridges)
    return 4.0 * work.batch * own, 4.0 * work.batch * others
