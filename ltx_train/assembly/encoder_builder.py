"""Encoders and decoders on a device, within the memory budget: what `prepare`, `sample`, `check` and previews open."""

from __future__ import annotations

from pathlib import Path

import torch

from ltx_train.assembly import from_config, model_source, resolve
from ltx_train.config import Config, sample_bucket
from ltx_train.data.prepare.encode import Encoders
from ltx_train.diffusion.grid import Bucket
from ltx_train.distributed import allocator
from ltx_train.distributed.ranks import Ranks
from ltx_train.memory.planning import encoding
from ltx_train.memory.planning.cards import GIB
from ltx_train.memory.planning.encoding import EncoderMemory, EncoderSizes
from ltx_train.model import loaders
from ltx_train.model.checkpoint import TensorSource
from ltx_train.sampling import media

_BF16 = 2


def encoders(config: Config, ranks: Ranks | None = None) -> Encoders:
    """The checkpoint's encoders, each loaded on first use. Caps this process at memory.budget_gib."""
    device = resolve.device(config, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of ranks that exchange nothing no process group has done it
    cap(config, device)
    memory = here(config, device)
    return Encoders(
        model_source.weights(config), text_encoder=config.model.text_encoder, text_tokens=config.model.text_tokens,
        device=device, dtype=from_config.dtype(config), latent_dtype=from_config.DTYPES[config.data.latent_dtype],
        streams_text=memory.streams_text, tiles=memory.tiles,
    )  # fmt: skip


def decoder(config: Config, device: torch.device) -> media.Decoder:
    """VAEs and vocoder, with the video VAE in tiles where the budget asks for it. Caps this process as `encoders`."""
    cap(config, device)
    return media.open_decoder(
        model_source.weights(config), device, from_config.dtype(config), tiles=here(config, device).tiles
    )


def cap(config: Config, device: torch.device) -> None:
    """Makes a process that reserves more than memory.budget_gib fail here, and not on a smaller card."""
    budget = resolve.budget_gib(config)
    if device.type == "cuda" and budget is not None:
        allocator.cap(device.index or 0, budget)


def here(config: Config, device: torch.device) -> EncoderMemory:
    """What fits into the budget, or into what is free on a GPU; everything whole on a CPU without a budget."""
    budget = resolve.budget_gib(config)
    if budget is None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget = (free + torch.cuda.memory_reserved(device)) / GIB
    return within(config, budget)


def within(config: Config, budget_gib: float | None) -> EncoderMemory:
    """What fits into a budget; everything whole without one."""
    streams_text, tiles = resolve.encoder_choice(config)
    if budget_gib is None and streams_text is None and tiles is None:
        return EncoderMemory(streams_text=False, tiles=False)
    return encoding.choose(sizes(config), budget_gib, streams_text=streams_text, tiles=tiles)


def sizes(config: Config) -> EncoderSizes:
    """Of the text encoder's folder, the checkpoint's connectors and the largest bucket."""
    source = model_source.layout(config)
    folder = config.model.text_encoder
    width: int = source.config["transformer"]["caption_channels"]
    states = width * loaders.text_hidden_states(source) * config.model.text_tokens * _BF16
    largest = max(_buckets(config), key=lambda bucket: bucket.width * bucket.height * bucket.frames)
    weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) if folder is not None else 0
    return EncoderSizes(
        text_gib=weights / GIB, connectors_gib=_connectors(source) * _BF16 / GIB, states_gib=states / GIB,
        width=largest.width, height=largest.height, frames=largest.frames,
    )  # fmt: skip


def _buckets(config: Config) -> list[Bucket]:
    return resolve.buckets(config) or [sample_bucket(config)]


def _connectors(source: TensorSource) -> int:
    return sum(parameter.numel() for parameter in loaders.build_text_connectors(source).parameters())
