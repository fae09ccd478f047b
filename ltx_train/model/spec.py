"""Translates a checkpoint's metadata `config` into the constructor arguments of each component.

Owns the mapping from the original configuration's keys to the arguments of the diffusers classes. A value that this
project does not implement raises a DataError that names it; no default is used silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ltx_train.contracts import DataError

Arguments = dict[str, Any]
Section = Mapping[str, Any]

_TRANSFORMER_FIXED: Mapping[str, Any] = {
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "norm_elementwise_affine": False,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "text_encoder_norm_type": "per_token_rms",
    "connector_apply_gated_attention": True,
}
_DOWNSAMPLE = {"compress_space_res": "spatial", "compress_time_res": "temporal", "compress_all_res": "spatiotemporal"}
_UPSAMPLE = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}


def section(config: Mapping[str, Any], name: str) -> Section:
    """One section of the metadata. DataError if the checkpoint does not have it."""
    if name not in config:
        raise DataError(f"the checkpoint's metadata has no section {name!r} (it has: {', '.join(sorted(config))})")
    return config[name]


def transformer(config: Mapping[str, Any]) -> Section:
    """The transformer section. DataError if this project does not implement its values (LTX-2.3 and 2.5)."""
    values = section(config, "transformer")
    _require(values, _TRANSFORMER_FIXED, "transformer")
    return values


def connectors(config: Mapping[str, Any], text_states: int) -> Arguments:
    """Arguments of `LTX2TextConnectors`; `text_states` is the number of hidden states of the text encoder."""
    t = transformer(config)
    width = t["num_attention_heads"] * t["attention_head_dim"]
    audio_width = t["audio_num_attention_heads"] * t["audio_attention_head_dim"]
    registers = t["connector_num_learnable_registers"]
    return {
        "caption_channels": t["caption_channels"],
        "text_proj_in_factor": text_states,
        "video_connector_num_attention_heads": t["connector_num_attention_heads"],
        "video_connector_attention_head_dim": t["connector_attention_head_dim"],
        "video_connector_num_layers": t["connector_num_layers"],
        "video_connector_num_learnable_registers": registers,
        "video_gated_attn": True,
        "audio_connector_num_attention_heads": t["audio_connector_num_attention_heads"],
        "audio_connector_attention_head_dim": t["audio_connector_attention_head_dim"],
        "audio_connector_num_layers": t["audio_connector_num_layers"],
        "audio_connector_num_learnable_registers": registers,
        "audio_gated_attn": True,
        "connector_rope_base_seq_len": t["connector_positional_embedding_max_pos"][0],
        "rope_theta": t["positional_embedding_theta"],
        "rope_double_precision": t["frequencies_precision"] == "float64",
        "rope_type": "split",
        "per_modality_projections": True,
        "video_hidden_dim": width,
        "audio_hidden_dim": audio_width,
        "proj_bias": True,
    }


def video_vae(config: Mapping[str, Any]) -> Arguments:
    """Arguments of `AutoencoderKLLTX2Video`."""
    v = section(config, "vae")
    _require(v, {"norm_layer": "pixel_norm", "timestep_conditioning": False}, "vae")
    encoder_layers, down = _read_blocks(v["encoder_blocks"], _DOWNSAMPLE)
    decoder_layers, up = _read_blocks(v["decoder_blocks"], _UPSAMPLE)
    widths = [v["latent_channels"] * prod(m for _, m in down[: i + 1]) for i in range(len(down))]
    # The decoder's blocks are listed from the pixel side and run in reverse. diffusers orders the widths the same way.
    decoder_widths = [v["decoder_base_channels"] * prod(m for _, m in up[: i + 1]) for i in range(len(up))]
    return {
        "latent_channels": v["latent_channels"],
        "patch_size": v["patch_size"],
        "block_out_channels": tuple(widths),
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(down),
        "layers_per_block": tuple(encoder_layers),
        "spatio_temporal_scaling": (True,) * len(down),
        "downsample_type": tuple(kind for kind, _ in down),
        "decoder_block_out_channels": tuple(decoder_widths),
        "decoder_layers_per_block": tuple(decoder_layers),
        "decoder_spatio_temporal_scaling": (True,) * len(up),
        "decoder_inject_noise": (False,) * len(decoder_layers),
        "upsample_type": tuple(kind for kind, _ in reversed(up)),
        "upsample_residual": (False,) * len(up),
        "upsample_factor": tuple(m for _, m in up),
        "encoder_causal": True,
        "decoder_causal": bool(v["causal_decoder"]),
        "encoder_spatial_padding_mode": v["encoder_spatial_padding_mode"],
        "decoder_spatial_padding_mode": v["spatial_padding_mode"],
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }


def audio_vae(config: Mapping[str, Any]) -> Arguments:
    """Arguments of `AutoencoderKLLTX2Audio`."""
    params = section(config, "audio_vae")["model"]["params"]
    network = params["ddconfig"]
    _require(network, {"norm_type": "pixel", "causality_axis": "height"}, "audio_vae")
    return {
        "base_channels": network["ch"],
        "output_channels": network["out_ch"],
        "ch_mult": tuple(network["ch_mult"]),
        "num_res_blocks": network["num_res_blocks"],
        "attn_resolutions": tuple(network["attn_resolutions"]) or None,
        "in_channels": network["in_channels"],
        "resolution": network["resolution"],
        "latent_channels": network["z_channels"],
        "mid_block_add_attention": network["mid_block_add_attention"],
        "sample_rate": params["sampling_rate"],
        "mel_bins": network["mel_bins"],
        "double_z": network["double_z"],
    }


def vocoder(config: Mapping[str, Any]) -> Arguments:
    """Arguments of `LTX2VocoderWithBWE`: the 16 kHz stage and its extension to 48 kHz."""
    v = section(config, "vocoder")
    extension = v["bwe"]
    arguments = _vocoder_stage(v["vocoder"], "") | _vocoder_stage(extension, "bwe_")
    return arguments | {
        "final_act_fn": "clamp",
        "filter_length": extension["n_fft"],
        "window_length": extension["n_fft"],
        "hop_length": extension["hop_length"],
        "num_mel_channels": extension["num_mels"],
        "input_sampling_rate": extension["input_sampling_rate"],
        "output_sampling_rate": extension["output_sampling_rate"],
    }


def _vocoder_stage(stage: Section, prefix: str) -> Arguments:
    fixed = {"resblock": "AMP1", "stereo": True, "use_tanh_at_final": False, "activation": "snakebeta"}
    _require(stage, fixed, "vocoder")
    return {
        f"{prefix}hidden_channels": stage["upsample_initial_channel"],
        f"{prefix}upsample_kernel_sizes": stage["upsample_kernel_sizes"],
        f"{prefix}upsample_factors": stage["upsample_rates"],
        f"{prefix}resnet_kernel_sizes": stage["resblock_kernel_sizes"],
        f"{prefix}resnet_dilations": stage["resblock_dilation_sizes"],
        f"{prefix}act_fn": stage["activation"],
        f"{prefix}final_bias": stage["use_bias_at_final"],
    }


def _read_blocks(blocks: list[Any], kinds: Mapping[str, str]) -> tuple[list[int], list[tuple[str, int]]]:
    """Splits the alternating list into residual layer counts and pairs (resampling kind, channel multiplier)."""
    layers: list[int] = []
    resamplings: list[tuple[str, int]] = []
    for index, (name, options) in enumerate(blocks):
        if index % 2 == 0 and name == "res_x":
            layers.append(options["num_layers"])
        elif index % 2 == 1 and name in kinds and not options.get("residual", False):
            resamplings.append((kinds[name], options["multiplier"]))
        else:
            raise DataError(f"the checkpoint's video VAE has an unknown block {name!r} {options} at index {index}")
    return layers, resamplings


def _require(values: Section, expected: Mapping[str, Any], where: str) -> None:
    wrong = {k: values[k] for k, v in expected.items() if k in values and values[k] != v}
    if wrong:
        values_text = ", ".join(f"{k}={v!r} (implemented: {expected[k]!r})" for k, v in wrong.items())
        raise DataError(f"the checkpoint's {where} has values that this release does not implement: {values_text}")
