"""Captions to text contexts: a text encoder's hidden states through the checkpoint's connectors.

Owns the two encoders: Gemma through transformers for the real model, and a small deterministic
stand-in for the tiny one. Contexts are computed once per caption, at preparation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import DataError

if TYPE_CHECKING:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

REGISTERS = 128


class TextEncoder(Protocol):
    """Turns a caption into all hidden states of a language model."""

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """(1, tokens, hidden size, states) and the attention mask (1, tokens); tokens is a multiple of 128."""
        ...


class StandInEncoder:
    """Hidden states of words hashed into a fixed random table: captions differ, nothing is downloaded."""

    def __init__(self, hidden_size: int, states: int, tokens: int = REGISTERS) -> None:
        self._hidden_size, self._states, self._tokens = hidden_size, states, tokens

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        words = caption.split()[: self._tokens]
        hidden = torch.zeros(1, self._tokens, self._hidden_size, self._states)
        mask = torch.zeros(1, self._tokens, dtype=torch.int64)
        for place, word in enumerate(words, start=self._tokens - len(words)):
            hidden[0, place] = rng.normal((self._hidden_size, self._states), 0, "stand-in", word)
            mask[0, place] = 1
        return hidden, mask


class GemmaEncoder:
    """Gemma from a local folder in the transformers layout; prompts are left padded to `tokens`."""

    def __init__(self, path: str | Path, *, device: str, dtype: torch.dtype, tokens: int = 1024) -> None:
        # transformers takes seconds to import, and only preparing and sampling need it.
        from transformers import AutoModel, AutoTokenizer

        gemma_fingerprint(path)  # says what is wrong with the folder better than transformers does
        self._device, self._tokens = device, tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left", local_files_only=True)
        model: Any = AutoModel.from_pretrained(path, dtype=dtype, local_files_only=True)
        # The vision tower of the multimodal wrapper is never needed here.
        self._model: Any = getattr(model, "language_model", model).to(device).eval()

    @torch.no_grad()
    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            caption.strip(), padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        out = self._model(**tokens, output_hidden_states=True)
        return torch.stack(out.hidden_states, dim=-1), tokens["attention_mask"]


def gemma_fingerprint(path: str | Path) -> str:
    """Identifies a text encoder folder by its file names, sizes and configuration."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise DataError(f"no text encoder at {path}: set model.text_encoder to a local Gemma folder")
    names = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model"})
    text = ";".join(f"{p.name}:{p.stat().st_size}" for p in names)
    return hashlib.sha256(text.encode() + (folder / "config.json").read_bytes()).hexdigest()[:16]


@torch.no_grad()
def contexts(encoder: TextEncoder, connectors: LTX2TextConnectors, caption: str) -> tuple[Tensor, Tensor]:
    """The video context (S, Dv) and the audio context (S, Da) of a caption.

    Padding is replaced by the connectors' registers, so every position may be attended to: no mask.
    """
    hidden, mask = encoder.encode(caption)
    parameter = next(connectors.parameters())
    video, audio, _ = connectors(hidden.to(parameter.device, parameter.dtype), mask.to(parameter.device))
    return video[0], audio[0]
