"""The LTX-2.3 transformer: diffusers' layers with a forward pass of its own.

diffusers supplies the layers and the rotary tables. Its forward pass is wrong for clean tokens and frozen modalities.
Here, in the audio-video cross-attention, scale and shift come from a stream's own per-token timesteps, and the gate
comes from the other stream's sigma. Absent modalities are not computed. Module names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AdaLayerNormSingle,
    LTX2AudioVideoRotaryPosEmbed,
    LTX2VideoTransformerBlock,
)
from torch import Tensor, nn

from ltx_train.contracts import Modality
from ltx_train.diffusion import transfer
from ltx_train.distributed.sequence import SequenceGroup, TokenSlice
from ltx_train.model.attention import Rotary, attend, bias_from_strength
from ltx_train.model.linear import rows_at
from ltx_train.model.spec import Section


class Stream(NamedTuple):
    """The blocks' inputs for one modality besides its hidden states; the same for all blocks of a forward pass.

    U is the number of distinct timesteps in the batch. Modulation is computed for these and gathered per token with
    the index `level` (B, T).
    """

    level: Tensor
    modulation: Tensor  # (U, 9 * D)
    cross_modulation: Tensor | None  # (U, 4 * D)
    cross_gate: Tensor | None  # (B, 1, D), from the other modality's sigma
    prompt_modulation: Tensor | None  # (B, 2 * D)
    context: Tensor
    context_bias: Tensor | None
    self_bias: Tensor | None
    cross_bias: Tensor | None  # on this modality's keys, for the other modality's queries
    text_scale: Tensor | None  # (B, T, 1)
    rotary: Rotary
    cross_rotary: Rotary
    embedded: Tensor  # (U, D)
    # Set under sequence parallelism: level, text_scale and rotary tables then cover this rank's tokens alone.
    token_slice: TokenSlice | None = None

    def cut(self, tokens: TokenSlice) -> Stream:
        """The stream of this rank's tokens. The biases still cover all tokens."""
        text = None if self.text_scale is None else tokens.cut(self.text_scale)
        rotary, cross = ((tokens.cut(cos, 2), tokens.cut(sin, 2)) for cos, sin in (self.rotary, self.cross_rotary))
        return self._replace(
            level=tokens.cut(self.level), text_scale=text, rotary=rotary, cross_rotary=cross, token_slice=tokens
        )

    def whole(self) -> Stream:
        """The stream of all tokens, for self-attention outside sequence parallelism."""
        tokens = self.token_slice
        if tokens is None:
            return self
        cos, sin = (tokens.whole(table.transpose(1, 2)).transpose(1, 2) for table in self.rotary)
        return self._replace(level=tokens.whole(self.level), rotary=(cos, sin), token_slice=None)


@dataclass(frozen=True, slots=True)
class Perturbation:
    """Parts that guidance switches off: self-attention of a modality in some blocks, or all audio-video attention."""

    skip_video: frozenset[int] = frozenset()
    skip_audio: frozenset[int] = frozenset()
    isolate_modalities: bool = False


UNPERTURBED = Perturbation()
_NO_MODULATION: tuple[Tensor, ...] = tuple[Tensor, ...]()
Pair = tuple[Tensor | None, Tensor | None]


class Block(LTX2VideoTransformerBlock):
    """One block of the transformer: diffusers' layers with this project's forward pass."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_stream: Stream | None,
        audio_stream: Stream | None,
        *,
        skip_video: bool,
        skip_audio: bool,
        isolate: bool,
    ) -> Pair:
        """Hidden states (B, Tv, Dv) and (B, Ta, Da) in and out. An absent modality and its stream are None."""
        v_mod = a_mod = _NO_MODULATION
        if video is not None and video_stream is not None:
            v_mod = _modulation(self.scale_shift_table, video_stream.modulation, video_stream.level)
            video = self._self_and_text_attention(video, video_stream, v_mod, "", skip_video)
        if audio is not None and audio_stream is not None:
            a_mod = _modulation(self.audio_scale_shift_table, audio_stream.modulation, audio_stream.level)
            audio = self._self_and_text_attention(audio, audio_stream, a_mod, "audio_", skip_audio)
        if video is not None and audio is not None and video_stream and audio_stream and not isolate:
            video, audio = self._cross_modal_attention(video, audio, video_stream, audio_stream)
        if video is not None:
            video = video + self.ff(_scaled(self.norm3(video), v_mod[3], v_mod[4])) * v_mod[5]
        if audio is not None:
            audio = audio + self.audio_ff(_scaled(self.audio_norm3(audio), a_mod[3], a_mod[4])) * a_mod[5]
        return video, audio

    def attended(self, hidden: Tensor, stream: Stream, name: str) -> Tensor:
        """The self-attention's input for hidden (B, T, D), normalized and modulated. name: "" or "audio_"."""
        mod = _modulation(getattr(self, f"{name}scale_shift_table"), stream.modulation, stream.level)
        return _scaled(getattr(self, f"{name}norm1")(hidden), mod[0], mod[1])

    def _self_and_text_attention(
        self, hidden: Tensor, stream: Stream, mod: tuple[Tensor, ...], name: str, skip: bool
    ) -> Tensor:
        layers: dict[str, Any] = {k: getattr(self, name + k) for k in ("norm1", "attn1", "norm2", "attn2")}
        attended = attend(
            layers["attn1"], _scaled(layers["norm1"](hidden), mod[0], mod[1]), bias=stream.self_bias,
            rotary=stream.rotary, values_only=skip, token_slice=stream.token_slice,
        )  # fmt: skip
        hidden = hidden + attended * mod[2]
        table = getattr(self, f"{name}prompt_scale_shift_table")
        prompt_shift, prompt_scale = _prompt_modulation(table, stream)
        query = _scaled(layers["norm2"](hidden), mod[6], mod[7])
        context = stream.context * (1 + prompt_scale) + prompt_shift
        text = attend(layers["attn2"], query, context, bias=stream.context_bias) * mod[8]
        return hidden + (text if stream.text_scale is None else text * stream.text_scale)

    def _cross_modal_attention(self, video: Tensor, audio: Tensor, v: Stream, a: Stream) -> tuple[Tensor, Tensor]:
        """Adds audio-to-video and video-to-audio attention. Both read the hidden states before either is updated."""
        v_table, a_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        assert v.cross_modulation is not None
        assert a.cross_modulation is not None
        assert v.cross_gate is not None
        assert a.cross_gate is not None
        v_mod = _modulation(v_table[:4], v.cross_modulation, v.level)
        a_mod = _modulation(a_table[:4], a.cross_modulation, a.level)
        v_norm, a_norm = self.audio_to_video_norm(video), self.video_to_audio_norm(audio)
        audio_context = _scaled(a_norm, a_mod[1], a_mod[0])
        if v.token_slice is not None:
            # The video tokens of every rank read all audio tokens, so each rank has a part of the audio's gradient.
            audio_context = v.token_slice.averaged_in_backward(audio_context)
        to_video = attend(
            self.audio_to_video_attn, _scaled(v_norm, v_mod[1], v_mod[0]), audio_context,
            bias=a.cross_bias, rotary=v.cross_rotary, key_rotary=a.cross_rotary,
        )  # fmt: skip
        to_audio = attend(
            self.video_to_audio_attn, _scaled(a_norm, a_mod[3], a_mod[2]), _scaled(v_norm, v_mod[3], v_mod[2]),
            bias=v.cross_bias, rotary=a.cross_rotary, key_rotary=v.cross_rotary, token_slice=v.token_slice,
        )  # fmt: skip
        video = video + (v_table[4] + v.cross_gate) * to_video
        return video, audio + (a_table[4] + a.cross_gate) * to_audio


def run_block(_index: int, block: Block, *arguments: Any, **flags: bool) -> Pair:
    """Calls a block. `memory` replaces this function to recompute, compile or stream blocks."""
    return block(*arguments, **flags)


class Transformer(nn.Module):
    """`transformer(video, audio) -> (video velocity, audio velocity)`, each (B, T, C) or None."""

    def __init__(self, config: Section) -> None:
        super().__init__()
        self.config = dict(config)
        width, audio_width = transformer_widths(config)
        self.patchify_proj = nn.Linear(config["in_channels"], width)
        self.audio_patchify_proj = nn.Linear(config["audio_in_channels"], audio_width)
        if config.get("use_keyframes_abs_pos_embedding", False):
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, width))
        self.adaln_single = LTX2AdaLayerNormSingle(width, 9)
        self.audio_adaln_single = LTX2AdaLayerNormSingle(audio_width, 9)
        self.av_ca_video_scale_shift_adaln_single = LTX2AdaLayerNormSingle(width, 4)
        self.av_ca_audio_scale_shift_adaln_single = LTX2AdaLayerNormSingle(audio_width, 4)
        self.av_ca_a2v_gate_adaln_single = LTX2AdaLayerNormSingle(width, 1)
        self.av_ca_v2a_gate_adaln_single = LTX2AdaLayerNormSingle(audio_width, 1)
        if config.get("use_prompt_adaln_single", True):
            self.prompt_adaln_single = LTX2AdaLayerNormSingle(width, 2)
            self.audio_prompt_adaln_single = LTX2AdaLayerNormSingle(audio_width, 2)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio_width))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.audio_norm_out = nn.LayerNorm(audio_width, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, config["out_channels"])
        self.audio_proj_out = nn.Linear(audio_width, config["audio_out_channels"])
        self.transformer_blocks = nn.ModuleList(Block(**_block_arguments(config)) for _ in range(config["num_layers"]))
        self._rotary = {name: _rotary(config, name) for name in ("video", "audio", "video_cross", "audio_cross")}
        self.run_block: Callable[..., Pair] = run_block
        # Sequence parallelism: the ranks that share each sample's video tokens.
        self.sequence_group: SequenceGroup | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers outside the blocks, which no quantizer touches."""
        return self.patchify_proj.weight.dtype

    def forward(self, video: Modality | None, audio: Modality | None, perturbation: Perturbation = UNPERTURBED) -> Pair:
        if video is None and audio is None:
            raise ValueError("at least one modality is needed")
        v_stream = self._stream(video, audio, "")
        a_stream = self._stream(audio, video, "audio_")
        v_hidden = None if video is None else self.patchify_proj(video.latent.to(self.dtype))
        a_hidden = None if audio is None else self.audio_patchify_proj(audio.latent.to(self.dtype))
        # Only the blocks work on this rank's token slice; the head reads all tokens.
        full_stream, token_slice = v_stream, None
        if self.sequence_group is not None and v_hidden is not None and v_stream is not None:
            token_slice = TokenSlice.of(self.sequence_group, v_hidden.shape[1])
            v_hidden, v_stream = token_slice.cut(v_hidden), v_stream.cut(token_slice)
        for index, block in enumerate(self.transformer_blocks):
            v_hidden, a_hidden = self.run_block(
                index, block, v_hidden, a_hidden, v_stream, a_stream,
                skip_video=index in perturbation.skip_video,
                skip_audio=index in perturbation.skip_audio,
                isolate=perturbation.isolate_modalities,
            )  # fmt: skip
        if token_slice is not None and v_hidden is not None:
            v_hidden = token_slice.whole(v_hidden)
        return self._head(v_hidden, full_stream, ""), self._head(a_hidden, a_stream, "audio_")

    def _stream(self, modality: Modality | None, other: Modality | None, name: str) -> Stream | None:
        if modality is None:
            return None
        kind = "audio" if name else "video"
        scale, gate_scale = self.config["timestep_scale_multiplier"], self.config["av_ca_timestep_scale_multiplier"]
        distinct = modality.levels or transfer.distinct(modality.timesteps)
        levels = distinct.values.to(modality.latent.device)
        modulation, embedded = self._embed(f"{name}adaln_single", levels * scale)
        prompt = f"{name}prompt_adaln_single"
        cross = gate = None
        if other is not None:
            cross = self._embed(f"av_ca_{kind}_scale_shift_adaln_single", levels * scale)[0]
            direction = "v2a" if name else "a2v"
            gate = self._embed(f"av_ca_{direction}_gate_adaln_single", other.sigma.float() * gate_scale)[0][:, None]
        positions = modality.positions.float()
        return Stream(
            level=distinct.index.to(modality.latent.device),
            modulation=modulation,
            cross_modulation=cross,
            cross_gate=gate,
            prompt_modulation=self._embed(prompt, modality.sigma.float() * scale)[0] if hasattr(self, prompt) else None,
            context=modality.context.to(self.dtype),
            context_bias=bias_from_strength(modality.context_mask, self.dtype),
            self_bias=bias_from_strength(modality.attention_mask, self.dtype),
            cross_bias=bias_from_strength(modality.cross_mask, self.dtype),
            text_scale=None if modality.reads_text is None else modality.reads_text.to(self.dtype)[..., None],
            rotary=self._tables(kind, positions),
            cross_rotary=self._tables(f"{kind}_cross", positions[:, :1]),
            embedded=embedded,
        )

    def _tables(self, name: str, positions: Tensor) -> Rotary:
        """Rotary (cos, sin) in the activations' dtype, as in the reference: half of the rotation's reads are tables."""
        cos, sin = self._rotary[name](positions)
        return cos.to(self.dtype), sin.to(self.dtype)

    def _embed(self, name: str, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """timesteps (N,) float32 -> modulation (N, n * D) and embedding (N, D)."""
        return getattr(self, name)(timesteps, hidden_dtype=self.dtype)

    def _head(self, hidden: Tensor | None, stream: Stream | None, name: str) -> Tensor | None:
        if hidden is None or stream is None:
            return None
        table = getattr(self, f"{name}scale_shift_table")
        shift, scale = (table[None] + stream.embedded[:, None]).unbind(1)
        normed = getattr(self, f"{name}norm_out")(hidden)
        return getattr(self, f"{name}proj_out")(
            _scaled(normed, rows_at(shift, stream.level), rows_at(scale, stream.level))
        )


def transformer_widths(config: Section) -> tuple[int, int]:
    """Hidden sizes of the video and the audio stream."""
    return (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["audio_num_attention_heads"] * config["audio_attention_head_dim"],
    )


def _block_arguments(config: Section) -> dict[str, Any]:
    width, audio_width = transformer_widths(config)
    return {
        "dim": width,
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "cross_attention_dim": config["cross_attention_dim"],
        "audio_dim": audio_width,
        "audio_num_attention_heads": config["audio_num_attention_heads"],
        "audio_attention_head_dim": config["audio_attention_head_dim"],
        "audio_cross_attention_dim": config["audio_cross_attention_dim"],
        "video_gated_attn": True,
        "video_cross_attn_adaln": True,
        "audio_gated_attn": True,
        "audio_cross_attn_adaln": True,
        "attention_bias": config["attention_bias"],
        "attention_out_bias": config["attention_bias"],
        "eps": config["norm_eps"],
        "rope_type": "split",
        "ff_bias": config.get("ff_bias", True),
        "audio_ff_bias": config.get("audio_ff_bias", True),
    }


def _rotary(config: Section, name: str) -> LTX2AudioVideoRotaryPosEmbed:
    """The rotary tables of self-attention, or of the audio-video cross-attention (time axis, audio width)."""
    width, _ = transformer_widths(config)
    seconds, height, width_pixels = config["positional_embedding_max_pos"]
    audio_seconds = config["audio_positional_embedding_max_pos"][0]
    base_seconds = {"video": seconds, "audio": audio_seconds}.get(name, max(seconds, audio_seconds))
    audio_dim = config["audio_num_attention_heads"] * config["audio_attention_head_dim"]
    dim = {"video": width, "audio": audio_dim}.get(name, config["audio_cross_attention_dim"])
    kind = name.split("_", maxsplit=1)[0]
    return LTX2AudioVideoRotaryPosEmbed(
        dim=dim,
        base_num_frames=base_seconds,
        base_height=height,
        base_width=width_pixels,
        theta=config["positional_embedding_theta"],
        modality=kind,
        double_precision=config["frequencies_precision"] == "float64",
        rope_type="split",
        num_attention_heads=config["num_attention_heads" if kind == "video" else "audio_num_attention_heads"],
    )


def _modulation(table: Tensor, levels: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Per-token modulation: table (n, D) + levels (U, n * D), gathered by index (B, T). n tensors (B, T, D)."""
    values = table[None] + levels.unflatten(-1, (table.shape[0], -1))
    return tuple(rows_at(row, index) for row in values.unbind(1))


def _prompt_modulation(table: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    if stream.prompt_modulation is None:
        return table[0], table[1]
    shift, scale = (table[None] + stream.prompt_modulation.unflatten(-1, (2, -1))).unbind(1)
    return shift[:, None], scale[:, None]


def _scaled(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return hidden * (1 + scale) + shift
