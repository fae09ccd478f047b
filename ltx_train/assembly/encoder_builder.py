"""Encoders and decoders on a device, within the memory budget: what `prepare`, `sample`, `check` and previews open."""

from __future__ import annotations

import torch

from ltx_train.assembly import encoder_plan, from_config, model_source, resolve
from ltx_train.config import Config
from ltx_train.contracts import UserError
from ltx_train.data.prepare.encode import Encoders
from ltx_train.diffusion.grid import Bucket
from ltx_train.distributed import allocator
from ltx_train.distributed.ranks import Ranks
from ltx_train.sampling import media

# Predicted peaks are within 5 % of measured ones.
_TOLERANCE = 1.05


def encoders(
    config: Config, ranks: Ranks | None = None, bucket: Bucket | None = None, *, with_text: bool = True
) -> Encoders:
    """The checkpoint's encoders, each loaded on first use. Caps this process at memory.budget_gib; UserError where they
    do not fit into it. bucket: the largest video that is encoded, of data.buckets without one. with_text: whether text
    is encoded, too."""
    device = resolve.device(config, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of ranks that exchange nothing no process group has done it
    cap(config, device)
    memory, budget = encoder_plan.here(config, device, bucket), resolve.budget_gib(config)
    if budget is not None and memory.prepare_gib > _TOLERANCE * budget:
        raise UserError(
            f"the encoders need about {memory.prepare_gib:.1f} GiB, more than memory.budget_gib={budget:g}: raise it, "
            "or take smaller or shorter buckets"
        )
    return Encoders(
        model_source.weights(config), text_encoder=config.model.text_encoder, text_tokens=config.model.text_tokens,
        device=device, dtype=from_config.dtype(config), latent_dtype=from_config.DTYPES[config.data.latent_dtype],
        streams_text=memory.streams_text, tile=memory.encode_tile, with_text=with_text,
    )  # fmt: skip


def decoder(config: Config, device: torch.device, bucket: Bucket | None = None) -> media.Decoder:
    """VAEs and vocoder, with the video VAE in tiles where the room on the device asks for it. Caps as `encoders`."""
    cap(config, device)
    memory = encoder_plan.here(config, device, bucket)
    return media.open_decoder(model_source.weights(config), device, from_config.dtype(config), tile=memory.decode_tile)


def cap(config: Config, device: torch.device) -> None:
    """Makes a process that reserves more than memory.budget_gib fail here, and not on a smaller card."""
    budget = resolve.budget_gib(config)
    if device.type == "cuda" and budget is not None:
        allocator.cap(device.index or 0, budget)
