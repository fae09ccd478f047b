"""A base with a LoRA merged into it, as a source of tensors: what is trained on top of a distilled LoRA.

Owns the merge at reading time, tensor by tensor; loaders, quantizers, exports and fingerprints see
a checkpoint like any other.
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
    """inner plus strength * B A; modules: by the checkpoint's name of the weight they change."""

    inner: TensorSource
    strength: float
    digest: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    modules: Mapping[str, str] = field(repr=False)

    @classmethod
    def open(cls, inner: TensorSource, path: str | Path, strength: float) -> MergedSource:
        """DataError when the file is no LoRA or does not bind to the base."""
        tensors, _ = read_lora(path)
        refuse_unbound(tensors, build_transformer(inner))
        modules = {transformer_original_name(f"{m}.weight"): m for m in sorted({module_of(n) for n in tensors})}
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return cls(inner=inner, strength=strength, digest=digest, tensors=tensors, modules=modules)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.inner.config

    def shape(self, name: str, wanted: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.inner.shape(name, wanted)

    def read(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        value = self.inner.read(name, shape, device)
        module = self.modules.get(name)
        return value if module is None else merged_weight(value, self.tensors, module, self.strength)

    def names(self, prefixes: Iterable[str]) -> set[str]:
        return self.inner.names(prefixes)

    def fingerprint(self, *prefixes: str) -> str:
        """The base's, and the LoRA's where it changes what is under the prefixes."""
        found = self.inner.fingerprint(*prefixes)
        if TRANSFORMER_PREFIX not in prefixes:
            return found
        return hashlib.sha256(f"{found}:{self.digest}:{self.strength:g}".encode()).hexdigest()[:16]
