"""What a plan is made from: sizes of the model, a micro-batch, the trained weights, and the choices that trade time for
memory.

Owns these dataclasses and the numbers that both the memory and the duration of a step follow from. No weights are
loaded: the sizes come from a transformer on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.weights.quantize import has_many_rows
from ltx_train.model.reach import tokens_seen
from ltx_train.model.transformer import Transformer, transformer_widths


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear layer of a block. rows: the tokens that it processes (video, audio or text). many_rows: whether there
    are enough of them for 8-bit products."""

    name: str
    inputs: int
    outputs: int
    rows: str
    many_rows: bool


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
    in_files, in files. by_hooks: DeepSpeed's ZeRO-3 gathers the weights. second_slices: devices over which it slices
    them a second time (hpZ), 1: not.
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
    by_hooks: bool = False
    second_slices: int = 1


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
    compiled: bool = True
    slices: int = 1


def sizes(transformer: Transformer) -> ModelSizes:
    """Reads the sizes of a transformer, which may be on the meta device."""
    width, audio_width = transformer_widths(transformer.config)
    block = transformer.transformer_blocks[0]
    linears = tuple(
        Linear(
            name=name,
            inputs=layer.in_features,
            outputs=layer.out_features,
            rows=tokens_seen(name),
            many_rows=has_many_rows(name),
        )
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


def unit_bytes(size: ModelSizes, work: Workload) -> float:
    """Bytes of one block's input."""
    return work.batch * (work.video * size.width + work.audio * size.audio_width) * float(work.dtype_bytes)


def dequantized_elements(size: ModelSizes, choice: MemoryChoice) -> int:
    """Weights of a block that are dequantized to be computed with."""
    if choice.quantize == "none":
        return 0
    layers = [c for c in size.linears if choice.compute == "bf16" or not c.many_rows]
    return sum(layer.inputs * layer.outputs for layer in layers)
