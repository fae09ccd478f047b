"""The linear layers that an adapter trains: named sets, the default set of a mode, and targets that cannot learn.

Names only; no torch. model/adapter.py checks the names that no block has against the model.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ltx_train.config.modes import training_modes
from ltx_train.config.schema import Config
from ltx_train.config.suggest import nearest
from ltx_train.contracts import ConditionKind, ConfigError, ModalityName, Mode, Placement, Role

_HEADS = ("to_q", "to_k", "to_v", "to_out.0")
_FEED = ("net.0.proj", "net.2")
_VIDEO = ("attn1", "attn2")
_AUDIO = ("audio_attn1", "audio_attn2")
_BRIDGES = ("audio_to_video_attn", "video_to_audio_attn")


def _paths(parts: tuple[str, ...], layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{part}.{layer}" for part in parts for layer in layers)


_AUDIO_STACK = (*_paths(_AUDIO, _HEADS), *_paths(("audio_ff",), _FEED))
_CROSS_MODAL = (*_AUDIO_STACK, *_paths(_BRIDGES, _HEADS))
_ATTENTION_FF = (*_HEADS, *_paths(("ff", "audio_ff"), _FEED))

SETS: dict[str, tuple[str, ...]] = {
    "attention": _HEADS,
    "attention_ff": _ATTENTION_FF,
    "all": (*_ATTENTION_FF, "to_gate_logits"),
    "video_only": _paths(_VIDEO, _HEADS),
    "video_ff": (*_paths(_VIDEO, _HEADS), *_paths(("ff",), _FEED)),
    "audio_only": _AUDIO_STACK,
    "video_to_audio": (*_AUDIO_STACK, *_paths(("video_to_audio_attn",), _HEADS)),
    "cross_modal": _CROSS_MODAL,
    "id_lora": _CROSS_MODAL,
}
_BLOCK = (
    *_paths((*_VIDEO, *_AUDIO, *_BRIDGES), (*_HEADS, "to_gate_logits")),
    *_paths(("ff", "audio_ff"), _FEED),
)


_OUTSIDE = (
    "patchify_proj", "audio_patchify_proj", "proj_out", "audio_proj_out",
    *_paths(
        (
            "adaln_single", "audio_adaln_single", "prompt_adaln_single", "audio_prompt_adaln_single",
            "av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single",
            "av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single",
        ),
        ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2"),
    ),
)  # fmt: skip


def with_targets(config: Config) -> Config:
    """The configuration with its targets as name endings: named sets expanded, or the default set of the mode."""
    if config.adapter.kind == "full":
        return config
    return replace(config, adapter=replace(config.adapter, targets=list(chosen(config))))


def follows_mode(config: Config) -> bool:
    """Whether the targets are the default set of the mode, so that another mode brings its own."""
    return config.adapter.targets in ([], list(SETS[of_mode(config.mode)]))


def chosen(config: Config) -> tuple[str, ...]:
    """The targets as name endings, without duplicates."""
    listed = list(config.adapter.targets) or [of_mode(config.mode)]
    return tuple(dict.fromkeys(ending for entry in listed for ending in SETS.get(entry, (entry,))))


def of_mode(mode: Mode) -> str:
    """The default set of a mode, used when the configuration names no target."""
    references = [c for c in mode.conditions if c.kind is ConditionKind.reference]
    if mode.audio is Role.absent:
        return "video_ff" if references else "video_only"
    if mode.video is Role.absent:
        return "audio_only"
    if mode.video is Role.freeze:
        return "video_to_audio"
    voices = [c for c in references if c.stream is ModalityName.audio and c.position is Placement.negative]
    return "cross_modal" if voices else "attention"


def validate(config: Config) -> None:
    """ConfigError names a target without layers, or whose layers no loss reaches."""
    modes = [mode for _, mode in training_modes(config)]
    for target in config.adapter.targets:
        for ending in SETS.get(target, (target,)):
            matches = [name for name in _BLOCK if name == ending or name.endswith(f".{ending}")]
            if not matches and not _elsewhere(ending):
                known = [*SETS, *_HEADS, *_BLOCK, *_OUTSIDE]
                raise ConfigError(f"adapter.targets: no layer's name ends with {ending!r}{nearest(ending, known)}")
            if matches and not any(_runs(name, mode) for name in matches for mode in modes):
                absent = "audio" if all(m.audio is Role.absent for m in modes) else "video"
                raise ConfigError(
                    f"adapter.targets: {target} names layers that mode.{absent}=absent gives no loss ({matches[0]}); "
                    f"leave adapter.targets empty for this mode's own set, {of_mode(config.mode)}"
                )
    for pattern in (*config.adapter.rank_pattern, *config.adapter.alpha_pattern):
        if not any(name == pattern or name.endswith(f".{pattern}") for name in _BLOCK):
            raise ConfigError(
                f"adapter.rank_pattern, alpha_pattern: no layer's name ends with {pattern!r}{nearest(pattern, _BLOCK)}"
            )


def _elsewhere(ending: str) -> bool:
    """Whether an ending names layers outside the blocks, or a layer of one block in full."""
    if any(name == ending or name.endswith(f".{ending}") for name in _OUTSIDE):
        return True
    match = re.fullmatch(r"(?:transformer_blocks\.)?\d+\.(.+)", ending)
    return match is not None and match[1] in _BLOCK


def _runs(name: str, mode: Mode) -> bool:
    part = name.partition(".")[0]
    video, audio = mode.video is not Role.absent, mode.audio is not Role.absent
    return video and audio if part in _BRIDGES else audio if part.startswith("audio_") else video
