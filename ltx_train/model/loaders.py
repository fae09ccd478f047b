"""Opens the components of a single-file checkpoint: transformer, VAEs, vocoder, text connectors.

Owns the assignment of tensors to components and their names in the checkpoint. Each loader takes a path or a
`TensorSource`, builds the module on the meta device and streams the weights into it. Classes that training does not use
are imported inside functions: importing them would delay every start by two seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ltx_train.contracts import DataError
from ltx_train.model import checkpoint, spec
from ltx_train.model.checkpoint import TensorSource
from ltx_train.model.transformer import Transformer

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

Source = str | Path | TensorSource
M = TypeVar("M", bound=nn.Module)
BlockQuantizer = Callable[[nn.Module], None]
BlockArrival = Callable[[int, nn.Module], None]

# Overlap of neighbouring tiles of the video VAE, in pixels. The VAE blends the tiles over it.
TILE_OVERLAP = 64
TRANSFORMER_PREFIX = "model.diffusion_model."
_CONNECTOR_PREFIXES = (
    f"{TRANSFORMER_PREFIX}video_embeddings_connector.",
    f"{TRANSFORMER_PREFIX}audio_embeddings_connector.",
)
_PROJECTION = "text_embedding_projection."
_ATTENTION_NORMS = (("norm_q.", "q_norm."), ("norm_k.", "k_norm."))
_TABLES = (
    ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
    ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
)


def load_transformer(
    path: Source,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: BlockQuantizer | None = None,
    arrived: BlockArrival | None = None,
) -> Transformer:
    """The transformer, frozen and in eval mode. dtype None keeps the stored dtype.

    `quantize(block)` and then `arrived(index, block)` are called for each block as soon as its weights are loaded. Peak
    memory is therefore only one block above the final size.
    """
    source = checkpoint.open_source(path)
    model = build_transformer(source)
    finished = _block_counter(model, quantize, arrived)
    checkpoint.load(
        model, source, transformer_original_name, (TRANSFORMER_PREFIX,),
        device=torch.device(device), dtype=dtype, excluded=_CONNECTOR_PREFIXES, done=finished,
    )  # fmt: skip
    return model.requires_grad_(False).eval()


def build_transformer(source: TensorSource) -> Transformer:
    """The transformer that the source's metadata describe, on the meta device, without weights."""
    with torch.device("meta"):
        return Transformer(spec.transformer(source.config))


def load_video_vae(
    path: Source, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, tile: int | None = None
) -> AutoencoderKLLTX2Video:
    """The video VAE. Its latents are not normalized; `codecs` normalizes them. tile: larger pictures are encoded and
    decoded in tiles of this edge in pixels, which overlap by 64; this needs less memory and changes latents a little.
    """
    from diffusers import AutoencoderKLLTX2Video

    source = checkpoint.open_source(path)
    with torch.device("meta"):
        model = AutoencoderKLLTX2Video(**spec.video_vae(source.config))
    if tile is not None:
        step = tile - TILE_OVERLAP
        model.enable_tiling(tile, tile, tile_sample_stride_height=step, tile_sample_stride_width=step)
    return _filled(model, source, video_vae_original_name, ("vae.",), device=device, dtype=dtype)


def load_audio_vae(path: Source, *, device: str | torch.device = "cpu") -> AutoencoderKLLTX2Audio:
    """The audio VAE, always in float32: in bfloat16 the errors of its latents are audible."""
    from diffusers import AutoencoderKLLTX2Audio

    source = checkpoint.open_source(path)
    with torch.device("meta"):
        model = AutoencoderKLLTX2Audio(**spec.audio_vae(source.config))
    return _filled(model, source, audio_vae_original_name, ("audio_vae.",), device=device, dtype=torch.float32)


def load_vocoder(path: Source, *, device: str | torch.device = "cpu") -> LTX2VocoderWithBWE:
    """The vocoder (log-mel to 48 kHz), always float32."""
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    source = checkpoint.open_source(path)
    # Not on the meta device: the constructor computes the resampling filter, which checkpoints do not contain.
    model = LTX2VocoderWithBWE(**spec.vocoder(source.config))
    return _filled(model, source, vocoder_original_name, ("vocoder.",), device=device, dtype=torch.float32)


def load_text_connectors(
    path: Source, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LTX2TextConnectors:
    """The text projections and connectors, which map the text encoder's states to the two contexts."""
    source = checkpoint.open_source(path)
    model = build_text_connectors(source)
    prefixes = (_PROJECTION, *_CONNECTOR_PREFIXES)
    return _filled(model, source, _connector_original_name, prefixes, device=device, dtype=dtype)


def build_text_connectors(source: TensorSource) -> LTX2TextConnectors:
    """The text projections and connectors on the meta device, without weights."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    with torch.device("meta"):
        return LTX2TextConnectors(**spec.connectors(source.config, text_hidden_states(source)))


def text_hidden_states(source: TensorSource) -> int:
    """Number of the text encoder's hidden states that the projection reads (49 for Gemma-3-12B)."""
    values = spec.transformer(source.config)
    if "text_hidden_states" in values:
        return values["text_hidden_states"]
    shape = source.shape(f"{_PROJECTION}video_aggregate_embed.weight", ())
    if shape is None:
        raise DataError(f"the checkpoint has no {_PROJECTION}video_aggregate_embed.weight")
    return shape[1] // values["caption_channels"]


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Bytes of the weights of encoders and decoders on a device."""

    connectors: int
    video_vae: int
    audio_vae: int
    vocoder: int


def weights_of_encoders(source: TensorSource, dtype_bytes: int) -> EncoderWeights:
    """From the source's metadata. The audio VAE and the vocoder are in float32 always."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    with torch.device("meta"):
        modules: tuple[nn.Module, ...] = (
            build_text_connectors(source),
            AutoencoderKLLTX2Video(**spec.video_vae(source.config)),
            AutoencoderKLLTX2Audio(**spec.audio_vae(source.config)),
            LTX2VocoderWithBWE(**spec.vocoder(source.config)),
        )
    connectors, video, audio, vocoder = (sum(p.numel() for p in module.parameters()) for module in modules)
    return EncoderWeights(dtype_bytes * connectors, dtype_bytes * video, 4 * audio, 4 * vocoder)


def expected_tensors(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a complete checkpoint of this architecture, by original name."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    with torch.device("meta"):
        components: tuple[tuple[nn.Module, checkpoint.Rename], ...] = (
            (Transformer(spec.transformer(source.config)), transformer_original_name),
            (AutoencoderKLLTX2Video(**spec.video_vae(source.config)), video_vae_original_name),
            (AutoencoderKLLTX2Audio(**spec.audio_vae(source.config)), audio_vae_original_name),
            (LTX2VocoderWithBWE(**spec.vocoder(source.config)), vocoder_original_name),
            (
                LTX2TextConnectors(**spec.connectors(source.config, text_hidden_states(source))),
                _connector_original_name,
            ),
        )
    return {name(k): tuple(v.shape) for module, name in components for k, v in module.state_dict().items()}


def transformer_original_name(name: str) -> str:
    """The checkpoint's name of a transformer tensor."""
    for ours, original in (*_ATTENTION_NORMS, *_TABLES):
        name = name.replace(ours, original)
    return TRANSFORMER_PREFIX + name


def _filled(
    model: M,
    source: TensorSource,
    original_name: checkpoint.Rename,
    prefixes: tuple[str, ...],
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> M:
    checkpoint.load(model, source, original_name, prefixes, device=torch.device(device), dtype=dtype)
    return model.to(device).requires_grad_(False).eval()


def _block_counter(
    model: Transformer, quantize: BlockQuantizer | None, arrived: BlockArrival | None
) -> Callable[[str], None]:
    """A callback for each loaded tensor. After a block's last tensor it calls `quantize` and `arrived`."""
    remaining = {i: len(block.state_dict()) for i, block in enumerate(model.transformer_blocks)}

    def placed(name: str) -> None:
        match = re.match(r"transformer_blocks\.(\d+)\.", name)
        if match is None:
            return
        index = int(match[1])
        remaining[index] -= 1
        if remaining[index] == 0:
            block = model.transformer_blocks[index].requires_grad_(False)
            if quantize is not None:
                quantize(block)
            if arrived is not None:
                arrived(index, block)

    return placed


def _connector_original_name(name: str) -> str:
    for kind in ("video", "audio"):
        name = name.replace(f"{kind}_text_proj_in.", f"{_PROJECTION}{kind}_aggregate_embed.")
        name = name.replace(f"{kind}_connector.", f"{TRANSFORMER_PREFIX}{kind}_embeddings_connector.")
    for ours, original in (*_ATTENTION_NORMS, (".transformer_blocks.", ".transformer_1d_blocks.")):
        name = name.replace(ours, original)
    return name


def video_vae_original_name(name: str) -> str:
    """The checkpoint's name of a video VAE tensor.

    The checkpoint numbers residual groups and resamplers in one list: encoder groups have even indices, decoder groups
    have even indices after the middle block, and resamplers are between the groups.
    """
    if name in _STATISTICS:
        return "vae." + _STATISTICS[name]
    name = re.sub(r"encoder\.mid_block\.resnets", "encoder.down_blocks.8.res_blocks", name)
    name = re.sub(r"decoder\.mid_block\.resnets", "decoder.up_blocks.0.res_blocks", name)
    name = re.sub(r"(down)_blocks\.(\d)\.resnets", lambda m: f"down_blocks.{2 * int(m[2])}.res_blocks", name)
    name = re.sub(r"(down)_blocks\.(\d)\.downsamplers\.0", lambda m: f"down_blocks.{2 * int(m[2]) + 1}", name)
    name = re.sub(r"(up)_blocks\.(\d)\.resnets", lambda m: f"up_blocks.{2 * int(m[2]) + 2}.res_blocks", name)
    name = re.sub(r"(up)_blocks\.(\d)\.upsamplers\.0", lambda m: f"up_blocks.{2 * int(m[2]) + 1}", name)
    return f"vae.{name}"


def audio_vae_original_name(name: str) -> str:
    """The checkpoint's name of an audio VAE tensor."""
    return "audio_vae." + _STATISTICS.get(name, name)


_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
_VOCODER_LAYERS = (
    ("conv_in.", "conv_pre."),
    ("conv_out.", "conv_post."),
    ("act_out.", "act_post."),
    ("upsamplers.", "ups."),
    ("resnets.", "resblocks."),
    ("downsample.filter", "downsample.lowpass.filter"),
)


def vocoder_original_name(name: str) -> str:
    """The checkpoint's name of a vocoder tensor."""
    for ours, original in _VOCODER_LAYERS:
        name = name.replace(ours, original)
    return f"vocoder.{name}"
