"""Opens the transformer the way a settled configuration says: quantized, streamed, kept, compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ltx_train.commands import session
from ltx_train.config import Config
from ltx_train.contracts import UserError
from ltx_train.diffusion import objective
from ltx_train.memory.cards import GIB
from ltx_train.memory.graph import CudaRecorder, StepGraphs
from ltx_train.memory.host import Host
from ltx_train.memory.offload import InputOffload
from ltx_train.memory.origin import Exchange, HostOrigin, PeerOrigin
from ltx_train.memory.quantize import block_quantizer
from ltx_train.memory.recompute import BlockRunner, Keep, arrange
from ltx_train.memory.shares import Shares
from ltx_train.memory.stream import WeightStream
from ltx_train.model import adapter, export, lora_file
from ltx_train.model.loaders import load_transformer
from ltx_train.model.sequence import Together
from ltx_train.model.transformer import Transformer
from ltx_train.training.ranks import ALONE, Ranks

_FLOAT8_CAPABILITY = (8, 9)


def trainable(config: Config, *, fresh: bool = True, ranks: Ranks = ALONE) -> Transformer:
    """The configured transformer on its device, with an adapter or all weights trainable (float32).

    fresh: the weights begin as configured; otherwise a checkpoint's are to be loaded into it. ranks: those that share
    the frozen blocks, where the strategy says so.
    """
    transformer = opened(config, ranks)
    if config.adapter.kind == "lora":
        lora = session.lora(config)
        adapter.attach(transformer, lora, config.run.seed)
        if transformer.together is not None:
            adapter.cut_dropout(transformer, transformer.together.rank)
        if fresh and config.adapter.start_from is not None:
            tensors, _ = lora_file.read_lora(config.adapter.start_from)
            export.start_from(transformer, tensors, lora)
    else:
        # Trained in shares, the weights are computed with as they are; alone they are their own masters.
        (transformer if session.shares_updates(config) else transformer.float()).requires_grad_(True)
    return transformer.train()


def shared(config: Config, ranks: Ranks, *, fresh: bool = True) -> tuple[Transformer, Shares]:
    """The same where ranks share the updates: an adapter, or all weights in the model's dtype with float32 masters."""
    exchange, device = ranks.exchange(), session.device(config, ranks.local if ranks.world > 1 else None)
    if config.adapter.kind == "lora":
        transformer, dtype = trainable(config, fresh=fresh, ranks=ranks), torch.float32
        shares = Shares(exchange, device, dtype)
    else:
        shares = Shares(exchange, device, session.dtype(config), host=_host(config, ranks))
        transformer = opened(config, ranks, exchange).requires_grad_(True).train()
    runner = transformer.run_block
    assert isinstance(runner, BlockRunner)
    units: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in adapter.trainable_parameters(transformer).items():
        units.setdefault(unit_of(name), []).append((name, parameter))
    stream = runner.stream if config.adapter.kind == "full" else None
    if stream is not None:
        assert isinstance(stream.origin, PeerOrigin)
        for index, block in enumerate(transformer.transformer_blocks):
            shares.bind(block_unit(index), block, index, stream, stream.origin)
            del units[block_unit(index)]
    for name, parameters in units.items():
        shares.hold(name, parameters)
    if config.adapter.kind == "full" and config.strategy.name != "zero1":
        runner.complete = lambda index: shares.reduce(block_unit(index))
        runner.beside.append(shares)
    shares.ready()
    return transformer, shares


def _host(config: Config, ranks: Ranks) -> Host | None:
    """Where the optimizer's state is kept, if not on the device."""
    place = config.strategy.offload
    if place is None:
        return None
    own = f"{config.run.experiment}-{config.run.id}-rank-{ranks.rank:05d}"
    return Host(None if place == "cpu" else Path(place) / own)


def block_unit(index: int) -> str:
    """What the parameters of a block travel as."""
    return f"transformer_blocks.{index}"


def unit_of(name: str) -> str:
    """What a parameter travels with: its block, or all that lies outside the blocks."""
    parts = name.split(".")
    return block_unit(int(parts[1])) if parts[0] == "transformer_blocks" else "outside"


def opened(config: Config, ranks: Ranks = ALONE, exchange: Exchange | None = None) -> Transformer:
    """The frozen transformer; streamed weights are proven to arrive as they were sent before it is used. exchange:
    of ranks that will update shares of them."""
    device = session.device(config, ranks.local if ranks.world > 1 else None)
    _limit(config, device)
    layout, memory = session.weights(config), config.memory
    layers = layout.config["transformer"]["num_layers"]
    gathered = config.strategy.name == "zero3" and (ranks.world > 1 or exchange is not None)
    arranged = arrange(
        layers, Keep(memory.keep or "inputs"), memory.keep_everything or 0,
        layers if gathered else memory.stream_blocks or 0, memory.offload_inputs or False,
    )  # fmt: skip
    stream = None
    if arranged.streamed:
        origin = PeerOrigin(exchange or ranks.exchange(), device) if gathered else HostOrigin(device)
        stream = WeightStream(arranged.streamed, memory.stream_slots, device, origin)
    transformer = load_transformer(
        layout, device=device, dtype=session.dtype(config), quantize=block_quantizer(memory.quantize, memory.compute),
        arrived=stream.stash_if_streamed if stream else None,
    )  # fmt: skip
    if stream is not None:
        stream.ready()
        stream.verify()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took for whole blocks
    transformer.together = _together(config, transformer, ranks)
    offload = InputOffload(arranged.offloaded, device) if arranged.offloaded else None
    transformer.run_block = BlockRunner(
        arranged.keep, compiled=session.compiles(config), stream=stream, offload=offload
    )
    return transformer


def _together(config: Config, transformer: Transformer, ranks: Ranks) -> Together | None:
    """Who takes samples together with this rank."""
    count, heads = config.strategy.sequence, transformer.config["num_attention_heads"]
    if heads % count:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise UserError(f"strategy.sequence={count}: {heads} heads cannot be shared out so: take one of {fitting}")
    return ranks.together(count)


def recorded(
    config: Config, transformer: Transformer, gathering: Sequence[torch.nn.Parameter], device: torch.device
) -> StepGraphs | None:
    """Passes as CUDA graphs, where the settled configuration wants them; gathering: whose gradients they add to.

    Collectives that gather blocks have never been recorded: such passes are launched.
    """
    runner = transformer.run_block
    if not config.memory.graphs or not isinstance(runner, BlockRunner):
        return None
    origin = runner.stream.origin if runner.stream is not None else None
    if isinstance(origin, PeerOrigin) and not origin.direct:
        return None
    return StepGraphs(partial(objective.backward, transformer), gathering, CudaRecorder(runner, device))


def _limit(config: Config, device: torch.device) -> None:
    """Holds the process to its budget, so that a plan that was wrong fails here and not on a smaller card."""
    if device.type != "cuda":
        return
    float8 = "float8" if config.memory.quantize == "float8" else "fp8" if config.memory.compute == "fp8" else None
    if float8 and torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no float8 arithmetic, which memory asks for ({float8}): set memory=int8")
    if config.memory.budget_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory.budget_gib * GIB / total), device)
