"""The metadata `config` of known architectures, for building a model without a checkpoint file.

`preset_config` has the structure of the `config` entry in a checkpoint's metadata, so that `spec` reads both files and
presets. Knows sizes only; no weights, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes that differ between the presets."""

    layers: int
    heads: int
    head_dim: int
    audio_head_dim: int
    video_channels: int
    audio_channels: int
    caption_channels: int
    text_states: int
    connector_layers: int
    vae_multipliers: tuple[int, int, int, int]
    vae_encoder_layers: tuple[int, ...]
    vae_decoder_layers: tuple[int, ...]
    vae_decoder_channels: int
    audio_vae_channels: int
    audio_vae_multipliers: tuple[int, ...]
    audio_vae_layers: int
    vocoder_channels: int
    bwe_channels: int
    resblock_kernels: tuple[int, ...]
    bwe_window: int


_MEL_BINS, _LATENT_MEL_BINS = 64, 16

PRESETS: dict[str, Sizes] = {
    "tiny": Sizes(
        layers=3, heads=4, head_dim=16, audio_head_dim=8, video_channels=16, audio_channels=2,
        caption_channels=32, text_states=5, connector_layers=2, vae_multipliers=(1, 2, 2, 1),
        vae_encoder_layers=(1, 1, 1, 1, 1), vae_decoder_layers=(1, 1, 1, 1, 1), vae_decoder_channels=4,
        audio_vae_channels=32, audio_vae_multipliers=(1, 2, 2), audio_vae_layers=1,
        vocoder_channels=64, bwe_channels=32, resblock_kernels=(3, 7), bwe_window=128,
    ),
    "ltx2_3_22b": Sizes(
        layers=48, heads=32, head_dim=128, audio_head_dim=64, video_channels=128, audio_channels=8,
        caption_channels=3840, text_states=49, connector_layers=8, vae_multipliers=(2, 2, 2, 1),
        vae_encoder_layers=(4, 6, 4, 2, 2), vae_decoder_layers=(4, 6, 4, 2, 2), vae_decoder_channels=128,
        audio_vae_channels=128, audio_vae_multipliers=(1, 2, 4), audio_vae_layers=2,
        vocoder_channels=1536, bwe_channels=512, resblock_kernels=(3, 7, 11), bwe_window=512,
    ),
}  # fmt: skip


def preset_config(name: str) -> Config:
    """The metadata `config` of a preset; KeyError for an unknown name (the schema allows only known names)."""
    sizes = PRESETS[name]
    return {
        "transformer": _transformer(sizes),
        "vae": _video_vae(sizes),
        "audio_vae": _audio_vae(sizes),
        "vocoder": _vocoder(sizes),
    }


def _transformer(s: Sizes) -> Config:
    width, audio_width = s.heads * s.head_dim, s.heads * s.audio_head_dim
    audio_tokens = s.audio_channels * _LATENT_MEL_BINS
    return {
        "activation_fn": "gelu-approximate", "attention_bias": True, "num_layers": s.layers,
        "num_attention_heads": s.heads, "attention_head_dim": s.head_dim,
        "in_channels": s.video_channels, "out_channels": s.video_channels, "cross_attention_dim": width,
        "audio_num_attention_heads": s.heads, "audio_attention_head_dim": s.audio_head_dim,
        "audio_in_channels": audio_tokens, "audio_out_channels": audio_tokens, "audio_cross_attention_dim": audio_width,
        "caption_channels": s.caption_channels, "norm_eps": 1e-6, "norm_elementwise_affine": False,
        "qk_norm": "rms_norm", "ff_bias": True, "audio_ff_bias": True,
        "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20], "rope_type": "split", "frequencies_precision": "float64",
        "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000,
        "apply_gated_attention": True, "cross_attention_adaln": True, "use_prompt_adaln_single": True,
        "use_keyframes_abs_pos_embedding": False, "caption_proj_before_connector": True,
        "text_encoder_norm_type": "per_token_rms",
        "connector_num_attention_heads": s.heads, "connector_attention_head_dim": s.head_dim,
        "connector_num_layers": s.connector_layers, "audio_connector_num_attention_heads": s.heads,
        "audio_connector_attention_head_dim": s.audio_head_dim, "audio_connector_num_layers": s.connector_layers,
        "connector_positional_embedding_max_pos": [4096], "connector_apply_gated_attention": True,
        "connector_num_learnable_registers": 128, "text_hidden_states": s.text_states,
    }  # fmt: skip


def _video_vae(s: Sizes) -> Config:
    encoder_kinds = ("compress_space_res", "compress_time_res", "compress_all_res", "compress_all_res")
    decoder_kinds = ("compress_space", "compress_time", "compress_all", "compress_all")
    return {
        "latent_channels": s.video_channels, "patch_size": 4, "norm_layer": "pixel_norm", "causal_decoder": False,
        "timestep_conditioning": False, "spatial_padding_mode": "zeros", "encoder_spatial_padding_mode": "zeros",
        "decoder_base_channels": s.vae_decoder_channels,
        "encoder_blocks": _blocks(s.vae_encoder_layers, encoder_kinds, s.vae_multipliers),
        "decoder_blocks": _blocks(s.vae_decoder_layers, decoder_kinds, (2, 2, 1, 2)),
    }  # fmt: skip


def _blocks(layers: tuple[int, ...], kinds: tuple[str, ...], multipliers: tuple[int, ...]) -> list[list[Any]]:
    blocks: list[list[Any]] = [["res_x", {"num_layers": layers[0]}]]
    for count, kind, multiplier in zip(layers[1:], kinds, multipliers, strict=True):
        blocks += [[kind, {"multiplier": multiplier}], ["res_x", {"num_layers": count}]]
    return blocks


def _audio_vae(s: Sizes) -> Config:
    network = {
        "ch": s.audio_vae_channels, "out_ch": 2, "ch_mult": list(s.audio_vae_multipliers),
        "num_res_blocks": s.audio_vae_layers, "attn_resolutions": [], "in_channels": 2, "resolution": 256,
        "z_channels": s.audio_channels, "double_z": True, "mid_block_add_attention": False, "norm_type": "pixel",
        "causality_axis": "height", "mel_bins": _MEL_BINS,
    }  # fmt: skip
    return {
        "model": {"params": {"sampling_rate": 16000, "ddconfig": network}},
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": _MEL_BINS, "mel_fmin": 0, "mel_fmax": 8000},
        },
    }


def _vocoder(s: Sizes) -> Config:
    def stage(channels: int, rates: list[int], kernels: list[int]) -> Config:
        return {
            "resblock": "AMP1", "stereo": True, "activation": "snakebeta", "use_tanh_at_final": False,
            "use_bias_at_final": False, "upsample_initial_channel": channels, "upsample_rates": rates,
            "upsample_kernel_sizes": kernels, "resblock_kernel_sizes": list(s.resblock_kernels),
            "resblock_dilation_sizes": [[1, 3, 5] for _ in s.resblock_kernels],
        }  # fmt: skip

    extension = stage(s.bwe_channels, [6, 5, 2, 2, 2], [12, 11, 4, 4, 4])
    extension |= {
        "input_sampling_rate": 16000, "output_sampling_rate": 48000, "n_fft": s.bwe_window, "hop_length": 80,
        "num_mels": _MEL_BINS,
    }  # fmt: skip
    return {"vocoder": stage(s.vocoder_channels, [5, 2, 2, 2, 2, 2], [11, 4, 4, 4, 4, 4]), "bwe": extension}
