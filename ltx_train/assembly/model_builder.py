"""Opens the transformer of a setup: quantized, streamed, sliced, compiled, with what is trained of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ltx_train.assembly import from_config, model_source
from ltx_train.assembly.setup import Setup
from ltx_train.contracts import ConfigError, StepResult, UserError
from ltx_train.diffusion import objective
from ltx_train.diffusion.objective import MicroBatch
from ltx_train.distributed import allocator, mapped_memory
from ltx_train.distributed.exchange import Exchange
from ltx_train.distributed.sequence import SequenceGroup
from ltx_train.memory.activations.input_offload import InputOffload
from ltx_train.memory.blocks.cuda_graphs import CudaRecorder, StepGraphs
from ltx_train.memory.blocks.hooked import HookedRunner
from ltx_train.memory.blocks.keep import arrange
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.memory.weights.flat_blocks import FlatBlocks
from ltx_train.memory.weights.quantize import block_quantizer
from ltx_train.memory.weights.stores import HostStore, PeerStore
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.model import adapter, export, lora_file
from ltx_train.model.loaders import load_transformer
from ltx_train.model.transformer import Block, Transformer
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.stability import coded_products
from ltx_train.updates.sliced_parameters import SlicedParameters
from ltx_train.updates.state_offload import StateOffload

_FLOAT8_CAPABILITY = (8, 9)


def open_trainable(setup: Setup, *, fresh: bool = True) -> Transformer:
    """The transformer on its device, with an adapter or all weights trainable (float32).

    fresh: the weights begin as configured; otherwise a checkpoint's are loaded afterwards.
    """
    transformer, config = open_frozen(setup), setup.config
    if setup.sharing.full:
        # Sliced updates keep float32 masters; otherwise the weights are their own masters.
        (transformer if setup.sharing.slices_updates else transformer.float()).requires_grad_(True)
        return transformer.train()
    lora = from_config.lora(config)
    adapter.attach(transformer, lora, config.run.seed)
    if transformer.sequence_group is not None:
        adapter.slice_dropout(transformer, transformer.sequence_group.rank)
    if fresh and config.adapter.start_from is not None:
        tensors, _ = lora_file.read_lora(config.adapter.start_from)
        export.start_from(transformer, tensors, lora)
    return transformer.train()


def open_saved(setup: Setup, checkpoint: Checkpoint) -> Transformer:
    """With the weights that a checkpoint publishes, and the products of its run."""
    transformer = open_trainable(setup, fresh=False)
    adapter.load_state(transformer, checkpoint.published)
    coded_products.dequantize(transformer, checkpoint.notes.get("dense_products") or [])
    return transformer


def open_sliced(setup: Setup, *, fresh: bool = True) -> tuple[Transformer, SlicedParameters]:
    """The same where ranks update slices: an adapter, or all weights in the model's dtype with float32 masters."""
    exchange = setup.ranks.exchange()
    if setup.sharing.full:
        sliced = SlicedParameters(
            exchange, setup.device, from_config.dtype(setup.config), offload=_state_offload(setup)
        )
        transformer = open_frozen(setup, sliced=True).requires_grad_(True).train()
    else:
        transformer = open_trainable(setup, fresh=fresh)
        sliced = SlicedParameters(exchange, setup.device, torch.float32)
    _add_units(sliced, transformer, setup)
    runner = transformer.run_block
    assert isinstance(runner, BlockRunner)
    if setup.sharing.reduces_in_backward:
        runner.reduce_with(lambda index: sliced.reduce(block_unit(index)), sliced)
    sliced.prepare_gradients()
    _report_fallback(setup, "gradients are summed", sliced.refusal)
    return transformer, sliced


def _report_fallback(setup: Setup, work: str, refusal: str) -> None:
    """A collective in the place of copies is a third slower: one line on the leading rank names the reason."""
    if refusal and setup.ranks.leads:
        print(f"ltx-train: {work} by NCCL, which is slower than copies between the devices: {refusal}", file=sys.stderr)


def _add_units(sliced: SlicedParameters, transformer: Transformer, setup: Setup) -> None:
    """Blocks whose weights are streamed first, then what stays whole."""
    units: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in adapter.trainable_parameters(transformer).items():
        units.setdefault(unit_of(name), []).append((name, parameter))
    stream = stream_of(transformer) if setup.sharing.full else None
    if stream is not None:
        assert isinstance(stream.store, PeerStore)
        for index, block in enumerate(transformer.transformer_blocks):
            sliced.add_streamed(block_unit(index), block, index, stream, stream.store)
            del units[block_unit(index)]
    for name, parameters in units.items():
        sliced.add_resident(name, parameters)


def stream_of(transformer: Transformer) -> WeightStream | None:
    """The weight stream of an opened transformer, if blocks are streamed."""
    runner = transformer.run_block
    stream = runner.stream if isinstance(runner, BlockRunner) else None
    return stream if isinstance(stream, WeightStream) else None


def _state_offload(setup: Setup) -> StateOffload | None:
    place, run = setup.sharing.offload, setup.config.run
    if place is None:
        return None
    own = f"{run.experiment}-{run.id}-rank-{setup.ranks.rank:05d}"
    return StateOffload(None if place == "cpu" else Path(place) / own)


def block_unit(index: int) -> str:
    """The name of a block's unit."""
    return f"transformer_blocks.{index}"


OUTSIDE = "outside"


def unit_of(name: str) -> str:
    """The unit of a parameter: its block, or everything outside the blocks."""
    parts = name.split(".")
    return block_unit(int(parts[1])) if parts[0] == "transformer_blocks" else OUTSIDE


def open_frozen(setup: Setup, *, sliced: bool = False) -> Transformer:
    """The frozen transformer. Streamed weights are compared with their store before they are used.

    sliced: whether ranks will update slices of the blocks.
    """
    device, memory = setup.device, setup.memory
    _limit(setup)
    source = model_source.weights(setup.config)
    layers = source.config["transformer"]["num_layers"]
    # Masters are slices, so training gathers blocks on one rank too. A measurement on one rank has whole blocks.
    gathers = setup.sharing.streams_slices if sliced else setup.sharing.gathers_blocks
    arranged = arrange(
        layers, memory.keep, keep_everything=memory.keep_everything,
        stream_blocks=layers if gathers else memory.stream_blocks, offload_inputs=memory.offload_inputs,
    )  # fmt: skip
    stream = None
    if arranged.streamed:
        store = PeerStore(_machine_exchange(setup), device) if gathers else HostStore(device)
        stream = WeightStream(arranged.streamed, memory.stream_slots, device, store)
    transformer = load_transformer(
        source, device=device, dtype=from_config.dtype(setup.config),
        quantize=block_quantizer(memory.quantize, memory.compute),
        arrived=stream.stash_if_streamed if stream else None,
    )  # fmt: skip
    if stream is not None:
        stream.allocate_ring()
        stream.verify()
        if isinstance(stream.store, PeerStore):
            _report_fallback(setup, "blocks are gathered", stream.store.refusal)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # loading took memory for whole blocks
    transformer.sequence_group = _sequence_group(setup, transformer)
    offload = InputOffload(arranged.offloaded, device) if arranged.offloaded else None
    transformer.run_block = BlockRunner(arranged.keep, compiled=setup.compiled, stream=stream, offload=offload)
    return transformer


def _machine_exchange(setup: Setup) -> Exchange:
    """Of the ranks of this machine. ConfigError, on all ranks, where neighbouring ranks are on several machines."""
    size = setup.sharing.local_world
    boots = setup.ranks.gather(mapped_memory.boot_id())
    if any(len(set(boots[first : first + size])) > 1 for first in range(0, len(boots), size)):
        raise ConfigError(
            f"strategy.devices={size} neighbouring ranks are not on one machine: start as many on each machine, in "
            "order (srun --ntasks-per-node, --distribution=block)"
        )
    return setup.ranks.exchange(size)


def enter_through_hooks(setup: Setup, transformer: Transformer) -> FlatBlocks:
    """Makes the blocks flat parameters, and lets them be called through DeepSpeed's hooks, which gather these."""
    memory, blocks = setup.memory, [block for block in transformer.transformer_blocks if isinstance(block, Block)]
    arranged = arrange(
        len(blocks), memory.keep, keep_everything=memory.keep_everything, stream_blocks=0, offload_inputs=False
    )
    flat = FlatBlocks(blocks)
    transformer.run_block = HookedRunner(blocks, arranged.keep, compiled=setup.compiled, flat=flat)
    return flat


def _sequence_group(setup: Setup, transformer: Transformer) -> SequenceGroup | None:
    size, heads = setup.sharing.sequence, transformer.config["num_attention_heads"]
    if heads % size:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise UserError(f"strategy.sequence={size}: {heads} heads cannot be divided so: take one of {fitting}")
    return setup.ranks.sequence_group(size)


def pass_graphs(
    setup: Setup, transformer: Transformer, accumulating: Sequence[torch.nn.Parameter]
) -> StepGraphs[MicroBatch, StepResult] | None:
    """Forward and backward as CUDA graphs, where the setup has them. accumulating: parameters whose gradients grow.

    Capturing NCCL's all-gather of blocks in a CUDA graph is untested, so such passes run eagerly.
    """
    runner = transformer.run_block
    if not setup.memory.graphs or not isinstance(runner, BlockRunner):
        return None
    store = runner.stream.store if isinstance(runner.stream, WeightStream) else None
    if isinstance(store, PeerStore) and not store.direct:
        return None
    return StepGraphs(partial(objective.backward, transformer), accumulating, CudaRecorder(runner, setup.device))


def _limit(setup: Setup) -> None:
    """Caps the process at its budget, so that a wrong plan fails here and not on a smaller card."""
    device, memory = setup.device, setup.memory
    if device.type != "cuda":
        return
    float8 = "float8" if memory.quantize == "float8" else "fp8" if memory.compute == "fp8" else None
    if float8 and torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no float8 arithmetic, which memory needs ({float8}): set memory=int8")
    if setup.budget_gib:
        allocator.cap(device.index or 0, setup.budget_gib)
