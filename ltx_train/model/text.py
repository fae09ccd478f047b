"""Computes text contexts of captions from a text encoder's hidden states and the checkpoint's connectors.

Owns two encoders: Gemma through transformers for the full model, and a small deterministic stand-in for the tiny
preset. Contexts are computed once per caption, when the data are prepared.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ltx_train import rng
from ltx_train.contracts import DataError

if TYPE_CHECKING:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

REGISTERS = 128
_LOCKED_SHARE = 0.5


class TextEncoder(Protocol):
    """Computes all hidden states of a language model for a caption."""

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """Hidden states (1, tokens, hidden size, states) and attention mask (1, tokens); tokens: a multiple of 128."""
        ...


class StandInEncoder:
    """Fixed random hidden states keyed by word: captions get different contexts without a downloaded model."""

    def __init__(self, hidden_size: int, states: int, tokens: int = REGISTERS) -> None:
        self._hidden_size, self._states, self._tokens = hidden_size, states, tokens

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        words = caption.split()[: self._tokens]
        hidden = torch.zeros(1, self._tokens, self._hidden_size, self._states)
        mask = torch.zeros(1, self._tokens, dtype=torch.int64)
        for position, word in enumerate(words, start=self._tokens - len(words)):
            hidden[0, position] = rng.normal((self._hidden_size, self._states), 0, "stand-in", word)
            mask[0, position] = 1
        return hidden, mask


class GemmaEncoder:
    """Gemma from a local folder in the transformers layout. Captions are padded on the left to `tokens`.

    streamed: the weights stay in host memory, and each comes to the device for its own product. The results are the
    same, bit for bit; a caption takes as long as the weights need to travel: 0.5 s from page-locked memory and 3.2 s
    from other memory, on an H200. Weights that take more than half of the host's memory are not page-locked.
    """

    def __init__(
        self, path: str | Path, *, device: str, dtype: torch.dtype, tokens: int = 1024, streamed: bool = False
    ) -> None:
        # transformers takes seconds to import, and only data preparation and sampling need it.
        from accelerate import cpu_offload
        from transformers import AutoModel, AutoTokenizer

        gemma_fingerprint(path)  # raises a clearer error for an unusable folder than transformers
        self._device, self._tokens = device, tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left", local_files_only=True)
        model: Any = AutoModel.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True)
        # Only the language model: the multimodal wrapper's vision tower is not needed.
        language: Any = getattr(model, "language_model", model).eval()
        if streamed:
            _page_lock(language, torch.device(device))
        self._model: Any = cpu_offload(language, torch.device(device)) if streamed else language.to(device)

    @torch.no_grad()
    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            caption.strip(), padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        out = self._model(**tokens, output_hidden_states=True)
        return torch.stack(out.hidden_states, dim=-1), tokens["attention_mask"]


def _page_lock(model: nn.Module, device: torch.device) -> None:
    """Moves the weights to page-locked host memory, from which they travel several times as fast."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if device.type != "cuda" or size > _LOCKED_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.pin_memory()


def gemma_fingerprint(path: str | Path) -> str:
    """Hash of a text encoder folder: file names and sizes, and the configuration. DataError without config.json."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise DataError(f"no text encoder at {path}: set model.text_encoder to a local Gemma folder")
    names = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model"})
    text = ";".join(f"{p.name}:{p.stat().st_size}" for p in names)
    return hashlib.sha256(text.encode() + (folder / "config.json").read_bytes()).hexdigest()[:16]


@torch.no_grad()
def contexts(encoder: TextEncoder, connectors: LTX2TextConnectors, caption: str) -> tuple[Tensor, Tensor]:
    """The video context (S, Dv) and the audio context (S, Da) of a caption.

    The connectors replace padding by registers, so every position is attended to and no mask is needed.
    """
    hidden, mask = encoder.encode(caption)
    parameter = next(connectors.parameters())
    video, audio, _ = connectors(hidden.to(parameter.device, parameter.dtype), mask.to(parameter.device))
    return video[0], audio[0]
