"""Sources of weights: the original single-file checkpoint, or seeded random numbers.

Owns reading, matching and naming of tensors. Loading is streamed: each tensor is read, converted and placed before the
next one is read. It must not know what a component computes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ltx_train import rng
from ltx_train.contracts import DataError
from ltx_train.model.presets import preset_config

Rename = Callable[[str], str]
_FINGERPRINT_BYTES = 4096
_NAMES_SHOWN = 12


class TensorSource(Protocol):
    """Named tensors and the metadata `config`, from which their modules are built."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def shape(self, name: str, expected: tuple[int, ...]) -> tuple[int, ...] | None:
        """The tensor's shape, or None if the source has no such tensor. Random sources return `expected`."""
        ...

    def read(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor: ...

    def names(self, prefixes: Iterable[str]) -> set[str]:
        """All names under the prefixes; empty for a source that generates tensors of any name."""
        ...

    def fingerprint(self, *prefixes: str) -> str: ...


@dataclass(frozen=True)
class CheckpointFile:
    """An original single-file checkpoint (safetensors with a `config` entry in its metadata)."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> CheckpointFile:
        """Reads the header only. DataError if the file is missing, damaged or has another layout."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no checkpoint at {path}: set model.path to the single-file .safetensors")
        try:
            with safe_open(path, "pt") as handle:
                metadata = handle.metadata() or {}
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is not a readable safetensors file ({error}): download it again") from error
        if "config" not in metadata:
            raise DataError(
                f"{path} has no `config` in its metadata: it is not an original LTX-2 single-file checkpoint"
            )
        return cls(path, json.loads(metadata["config"]), shapes, dtypes)

    def shape(self, name: str, expected: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.shapes.get(name)

    def read(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        # Opening the file for each tensor keeps at most one tensor's pages mapped.
        with safe_open(self.path, "pt", device=str(device)) as handle:
            return handle.get_tensor(name).clone()

    def names(self, prefixes: Iterable[str]) -> set[str]:
        return {name for name in self.shapes if name.startswith(tuple(prefixes))}

    def fingerprint(self, *prefixes: str) -> str:
        """Hash of the tensors under the prefixes: names, shapes, dtypes, and the first and last bytes of every tensor.

        Any training step changes every tensor, so these bytes distinguish two models without reading 40 GB.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name in sorted(self.names(prefixes)):
                entry = header[name]
                start, end = entry["data_offsets"]
                digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                for offset in sorted({start, max(start, end - _FINGERPRINT_BYTES)}):
                    file.seek(8 + length + offset)
                    digest.update(file.read(min(_FINGERPRINT_BYTES, end - offset)))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RandomWeights:
    """Seeded random weights of a preset: any architecture without a file."""

    preset: str
    seed: int = 0

    @property
    def config(self) -> Mapping[str, Any]:
        return preset_config(self.preset)

    def shape(self, name: str, expected: tuple[int, ...]) -> tuple[int, ...] | None:
        return expected

    def read(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("bias", "alpha", "beta", "mean-of-means"):
            return torch.zeros(shape, device=device)
        if leaf == "std-of-means" or "norm" in name.split(".")[-2:][0]:
            return torch.ones(shape, device=device)
        if leaf == "filter":
            return torch.full(shape, 1 / shape[-1], device=device)
        # A generator on the target device: drawing 19 billion normals on one CPU core would take minutes.
        stream = torch.Generator(device).manual_seed(rng.key_seed(self.seed, "weights", name))
        return torch.randn(shape, generator=stream, device=device) / math.sqrt(_fan_in(name, shape))

    def names(self, prefixes: Iterable[str]) -> set[str]:
        return set()

    def fingerprint(self, *prefixes: str) -> str:
        text = f"random:{self.preset}:{self.seed}:{','.join(sorted(prefixes))}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_source(source: str | Path | TensorSource) -> TensorSource:
    """Opens a path as a checkpoint file; returns a source unchanged."""
    return CheckpointFile.open(source) if isinstance(source, str | Path) else source


def load(
    module: nn.Module,
    source: TensorSource,
    original_name: Rename,
    prefixes: tuple[str, ...],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    excluded: tuple[str, ...] = (),
    done: Callable[[str], None] | None = None,
) -> None:
    """Fills `module` (usually on the meta device) in place, tensor by tensor.

    original_name maps the name of a module's tensor to the checkpoint's. The source must contain every tensor of the
    module in its shape, and the module must use every tensor under `prefixes` except those under `excluded`. Otherwise
    one DataError lists all mismatches before any tensor is read.
    dtype: None keeps the stored dtype. done: called with the name of each module tensor after it is in place.
    """
    original_names = {name: original_name(name) for name, _ in _tensors(module)}
    _match(module, source, original_names, prefixes, excluded)
    for name, tensor in list(_tensors(module)):
        value = source.read(original_names[name], tuple(tensor.shape), device)
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        _place(module, name, value)
        if done is not None:
            done(name)


def _match(
    module: nn.Module,
    source: TensorSource,
    original_names: Mapping[str, str],
    prefixes: tuple[str, ...],
    excluded: tuple[str, ...],
) -> None:
    missing: list[str] = []
    misshapen: list[str] = []
    for name, tensor in _tensors(module):
        original = original_names[name]
        shape = source.shape(original, tuple(tensor.shape))
        if shape is None:
            missing.append(original)
        elif shape != tuple(tensor.shape):
            misshapen.append(f"{original} is {list(shape)}, the configuration says {list(tensor.shape)}")
    available = (
        {n for n in source.names(prefixes) if not n.startswith(excluded)} if excluded else source.names(prefixes)
    )
    left_over = sorted(available - set(original_names.values()))
    problems = [("missing", missing), ("left over", left_over), ("of another shape", misshapen)]
    if any(names for _, names in problems):
        raise DataError(
            "the checkpoint does not fit its own configuration:" + "".join(_listed(*p) for p in problems if p[1])
        )


def _listed(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"\n  {len(names)} {title}: " + ", ".join(names[:_NAMES_SHOWN]) + more


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by name."""
    return iter(module.state_dict(keep_vars=True).items())


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    if "table" in name:
        return shape[-1]
    return max(1, math.prod(shape[1:]))
