"""From the configuration and the machine to the memory of encoders and decoders: whole, layer by layer, in tiles."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ltx_train.assembly import from_config, model_source, resolve
from ltx_train.config import Config, prompted, sample_bucket
from ltx_train.diffusion.grid import Bucket
from ltx_train.distributed import allocator
from ltx_train.memory.planning import encoding
from ltx_train.memory.planning.cards import GIB
from ltx_train.memory.planning.encoding import EncoderMemory, EncoderSizes
from ltx_train.model import loaders

_BF16 = 2
_HEADER = 8


def here(config: Config, device: torch.device, bucket: Bucket | None = None) -> EncoderMemory:
    """What fits into the budget, or on a GPU, beside what this process has there already. bucket: the largest video,
    of data.buckets without one."""
    budget = resolve.budget_gib(config)
    if device.type == "cuda":
        budget = allocator.room_gib(device.index or 0, budget)
    return within(config, budget, bucket)


def within(config: Config, budget_gib: float | None, bucket: Bucket | None = None) -> EncoderMemory:
    """What fits into a budget; everything whole without one."""
    streams_text, tiles = resolve.encoder_choice(config)
    if budget_gib is None and streams_text is None and tiles is None:
        return EncoderMemory(streams_text=False, encode_tile=None, decode_tile=None)
    return encoding.choose(sizes(config, bucket), budget_gib, streams_text=streams_text, tiles=tiles)


def between_steps_gib(config: Config) -> float:
    """What a run needs between its steps beside the model: the decoders of its generated clips, in the least tiles."""
    if not config.eval.samples and not prompted(config):
        return 0.0
    return encoding.least_decode_gib(sizes(config), tiles=resolve.encoder_choice(config)[1])


def sizes(config: Config, bucket: Bucket | None = None) -> EncoderSizes:
    """Of the text encoder's folder, the checkpoint's encoders and decoders, and the largest bucket."""
    source, folder = model_source.layout(config), config.model.text_encoder
    width: int = source.config["transformer"]["caption_channels"]
    states = width * loaders.text_hidden_states(source) * config.model.text_tokens * _BF16
    buckets = [bucket] if bucket else resolve.buckets(config) or [sample_bucket(config)]
    video = max(buckets, key=lambda b: b.width * b.height * b.frames)
    tensors = [] if folder is None else _tensor_sizes(Path(folder))
    modules = model_source.encoder_weights(config, from_config.dtype(config).itemsize)
    return EncoderSizes(
        text_gib=sum(tensors) / GIB, largest_text_gib=max(tensors, default=0) / GIB, states_gib=states / GIB,
        connectors_gib=modules.connectors / GIB, video_vae_gib=modules.video_vae / GIB,
        audio_vae_gib=modules.audio_vae / GIB, vocoder_gib=modules.vocoder / GIB,
        width=video.width, height=video.height, frames=video.frames,
    )  # fmt: skip


def description(memory: EncoderMemory, *, has_text: bool) -> str:
    """The peaks of `prepare` and of decoding, and how they are reached. has_text: whether the text encoder's size is
    known."""
    text = f"text encoder {'layer by layer' if memory.streams_text else 'whole'}, " if has_text else ""
    without = "" if has_text else "; without the text encoder: model.text_encoder is not set"
    return (
        f"prepare needs about {memory.prepare_gib:.1f} GiB ({text}video {_tiles(memory.encode_tile)}{without}), "
        f"decoding of generated clips {memory.decode_gib:.1f} GiB ({_tiles(memory.decode_tile)})"
    )


def _tiles(edge: int | None) -> str:
    return "whole" if edge is None else f"in tiles of {edge} pixels"


def _tensor_sizes(folder: Path) -> list[int]:
    """Bytes of the tensors in the folder's safetensors files. Unreadable files count whole; loading names them."""
    found: list[int] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(_HEADER), "little")))
            ranges = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            found += [int(end) - int(start) for start, end in ranges]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError, RecursionError):
            found.append(path.stat().st_size)
    return found
