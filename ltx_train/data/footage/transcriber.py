"""Transcripts of clips by a local speech-recognition model of transformers: Whisper, wav2vec 2.0 and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltx_train.contracts import ConfigError

RATE = 16000
# Length of Whisper's input. Longer sounds are transcribed in overlapping parts.
_PART_S = 30


class Transcriber:
    """model: a folder, or the name of a model that transformers finds. ConfigError when there is none."""

    def __init__(self, model: str, device: torch.device) -> None:
        from transformers import pipeline

        try:
            self._pipeline: Any = pipeline("automatic-speech-recognition", model=model, device=device)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"caption.speech={model} is no speech model of transformers ({reason}): "
                "give its folder, as one downloaded from openai/whisper-small"
            ) from error

    def text(self, mono: Tensor) -> str:
        """The words in a sound, (T,) at 16 kHz, as one line."""
        sound = {"raw": mono.numpy(), "sampling_rate": RATE}
        # With parts, CTC models lose the last frames of a sound.
        parts = {"chunk_length_s": _PART_S} if len(mono) > _PART_S * RATE else {}
        return " ".join(str(self._pipeline(sound, **parts)["text"]).split())
