"""Which weights a mode's loss reaches: what is worth training, and what never would move; whose tokens a layer sees.

Owns the graph of a block as far as gradients go (see transformer.Block.forward). Names and roles
only.
"""

from __future__ import annotations

from collections.abc import Iterable

from ltx_train.contracts import Mode, Role


def sees_loss(name: str, modes: Iterable[Mode], layers: int) -> bool:
    """Whether the weights of a module (its full name) get a gradient in any of the modes."""
    return any(_reached(name, mode, layers) for mode in modes)


def tokens_seen(layer: str) -> str:
    """Whose tokens a linear layer of a block multiplies: video, audio or text; layer: its name within the block."""
    part, _, own = layer.partition(".")
    if part in ("attn2", "audio_attn2") and own in ("to_k", "to_v"):
        return "text"
    from_other = own in ("to_k", "to_v")
    if part == "audio_to_video_attn":
        return "audio" if from_other else "video"
    if part == "video_to_audio_attn":
        return "video" if from_other else "audio"
    return "audio" if part.startswith("audio_") else "video"


def _reached(name: str, mode: Mode, layers: int) -> bool:
    video, audio = mode.video is not Role.absent, mode.audio is not Role.absent
    parts = name.split(".")
    if parts[0] != "transformer_blocks":
        both = parts[0].startswith("av_ca_")
        return video and audio if both else audio if parts[0].startswith("audio_") else video
    # Bridges read both streams before either moves on, so what a block does after its bridges is seen by the other
    # modality in the next block only.
    later = int(parts[1]) < layers - 1
    from_video, from_audio = mode.video is Role.generate, mode.audio is Role.generate
    match parts[2].removeprefix("audio_"):
        case "attn1" | "attn2":
            return audio and (from_audio or video) if parts[2].startswith("audio_") else video and (from_video or audio)
        case "to_video_attn":
            return video and audio and (from_video or later)
        case "ff":
            own, other = (from_audio, video) if parts[2].startswith("audio_") else (from_video, audio)
            return (audio if parts[2].startswith("audio_") else video) and (own or (other and later))
        case _:
            return video and audio and (from_audio or later)
