"""A base checkpoint with a LoRA merged into it, as a `TensorSource`; used to train on top of a distilled LoRA.

Owns the merge, tensor by tensor at reading time. Loaders, quantizers, exports and fingerprints treat it like any other
checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.model.checkpoint import TensorSource
from ltx_train.model.loaders import TRANSFORMER_PREFIX, build_transformer, transformer_original_name
from ltx_train.model.lora_file import merged_weight, module_of, read_lora, refuse_unbound


@dataclass(frozen=True, kw_only=True)
class MergedSource:
    """inner plus strength * B A. tensors: of the LoRA. modules: module by the checkpoint's name of its weight."""

    inner: TensorSource
    strength: float
    digest: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    modules: Mapping[str, str] = field(repr=False)

    @classmethod
    def open(cls, inner: TensorSource, path: str | Path, strength: float) -> MergedSource:
        """Reads the LoRA. DataError if the file is not a LoRA or does not bind to the base."""
        tensors, _ = read_lora(path)
        refuse_unbound(tensors, build_transformer(inner))
        modules = {transformer_original_name(f"{m}.weight"): m for m in sorted({module_of(n) for n in tensors})}
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return cls(inner=inner, strength=strength, digest=digest, tensors=tensors, modules=modules)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.inner.config

    def shape(self, name: str, expected: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.inner.shape(name, expected)

    def read(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        value = self.inner.read(name, shape, device)
        module = self.modules.get(name)
        return value if module is None else merged_weight(value, self.tensors, module, self.strength)

    def names(self, prefixes: Iterable[str]) -> set[str]:
        return self.inner.names(prefixes)

    def fingerprint(self, *prefixes: str) -> str:
        """The base's fingerprint, combined with the LoRA's if the prefixes include the transformer."""
        base = self.inner.fingerprint(*prefixes)
        if TRANSFORMER_PREFIX not in prefixes:
            return base
        return hashlib.sha256(f"{base}:{self.digest}:{self.strength:g}".encode()).hexdigest()[:16]
