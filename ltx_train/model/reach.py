"""Which weights get a gradient from a mode's loss, and which tokens a linear layer processes.

Owns the gradient paths through a block (see transformer.Block.forward). Knows module names and roles only.
"""

from __future__ import annotations

from collections.abc import Iterable

from ltx_train.contracts import Mode, Role


def sees_loss(name: str, modes: Iterable[Mode], layers: int) -> bool:
    """Whether a module's weights get a gradient in any of the modes. name: full name; layers: number of blocks."""
    return any(_reached(name, mode, layers) for mode in modes)


def tokens_seen(layer: str) -> str:
    """The tokens that a linear layer of a block processes: video, audio or text. layer: its name within the block."""
    part, _, projection = layer.partition(".")
    if part in ("attn2", "audio_attn2") and projection in ("to_k", "to_v"):
        return "text"
    from_other = projection in ("to_k", "to_v")
    if part == "audio_to_video_attn":
        return "audio" if from_other else "video"
    if part == "video_to_audio_attn":
        return "video" if from_other else "audio"
    return "audio" if part.startswith("audio_") else "video"


def _reached(name: str, mode: Mode, layers: int) -> bool:
    video, audio = mode.video is not Role.absent, mode.audio is not Role.absent
    parts = name.split(".")
    if parts[0] != "transformer_blocks":
        cross_modal = parts[0].startswith("av_ca_")
        return video and audio if cross_modal else audio if parts[0].startswith("audio_") else video
    # Both cross-modal attentions read the streams as they are before either is updated. Later results of a block
    # therefore reach the other modality only in the next block.
    later = int(parts[1]) < layers - 1
    from_video, from_audio = mode.video is Role.generate, mode.audio is Role.generate
    match parts[2].removeprefix("audio_"):
        case "attn1" | "attn2":
            return audio and (from_audio or video) if parts[2].startswith("audio_") else video and (from_video or audio)
        case "to_video_attn":
            return video and audio and (from_video or later)
        case "ff":
            generated, other = (from_audio, video) if parts[2].startswith("audio_") else (from_video, audio)
            return (audio if parts[2].startswith("audio_") else video) and (generated or (other and later))
        case _:
            return video and audio and (from_audio or later)
