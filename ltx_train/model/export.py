"""Trained weights as files others can load: a LoRA for ComfyUI and diffusers, or a full checkpoint.

Owns the exported names and metadata, and the proof that a file binds to a base. It must not know
runs or training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_train.contracts import DataError
from ltx_train.model import adapter
from ltx_train.model.checkpoint import CheckpointFile, TensorSource
from ltx_train.model.loaders import expected_tensors, transformer_original_name

LORA_PREFIX = "diffusion_model."


def lora_tensors(parameters: Mapping[str, Tensor], rank: int, alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """`diffusion_model.<module>.lora_A/B.weight`; alpha / rank is folded into B, so that the file needs no alpha."""
    scale = alpha / rank
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = parameter.detach().float() * (scale if ".lora_B." in name else 1.0)
        tensors[LORA_PREFIX + name] = value.to(dtype).cpu().contiguous()
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or absent; DataError when the disk refuses or a number is not finite."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DataError(f"{len(broken)} tensors are not finite (first: {broken[0]}): nothing was written")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, {"format": "pt", **metadata})
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} could not be written ({error})") from error


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by module name (`<module>.lora_A.weight`) and metadata; DataError if it is not a whole LoRA."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no LoRA at {path}")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}): it may be cut short") from error
    foreign = [name for name in tensors if ".lora_A." not in name and ".lora_B." not in name]
    if foreign or not tensors:
        raise DataError(f"{path} is not a LoRA: {foreign[0] if foreign else 'it holds no tensors'}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DataError(f"{path}: {len(broken)} tensors are not finite (first: {broken[0]})")
    return {name.removeprefix(LORA_PREFIX): tensor for name, tensor in tensors.items()}, metadata


def unbound_keys(tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Every reason why a LoRA does not fit a model (on the meta device will do): unknown modules, halves, shapes."""
    linears = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    problems: list[str] = []
    for name, tensor in tensors.items():
        module, _, half = name.rpartition(".lora_")
        other = f"{module}.lora_{'B' if half.startswith('A') else 'A'}.weight"
        if module not in linears:
            problems.append(f"{name}: the base has no such module")
        elif other not in tensors:
            problems.append(f"{name}: its other half is missing")
        else:
            layer = linears[module]
            rank = tensors[f"{module}.lora_A.weight"].shape[0]
            wanted = (rank, layer.in_features) if half.startswith("A") else (layer.out_features, rank)
            if tuple(tensor.shape) != wanted:
                problems.append(f"{name}: shape {list(tensor.shape)}, the base needs {list(wanted)}")
    return problems


def bind(model: nn.Module, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Attaches a LoRA read from a file to a model, at a strength. DataError lists what does not bind."""
    problems = unbound_keys(tensors, model)
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "\n  ".join(problems[:10])
        raise DataError(f"{len(problems)} of {len(tensors)} keys do not bind to the base:\n  {listed}{more}")
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    ranks = {m: tensors[f"{m}.lora_A.weight"].shape[0] for m in modules}
    if len(set(ranks.values())) != 1:
        raise DataError(f"the LoRA mixes ranks ({sorted(set(ranks.values()))}), which this release does not load")
    rank = next(iter(ranks.values()))
    adapter.attach(model, adapter.Lora(rank, rank, 0.0, tuple(modules)), seed=0)
    adapter.load_state(model, {name: tensor.float() for name, tensor in tensors.items()})
    adapter.set_strength(model, strength)


def merge(model: nn.Module, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Adds strength * B A to the weights in place, as a loader without adapters does; sums in float32."""
    for name in tensors:
        module, _, half = name.rpartition(".lora_")
        if half.startswith("A"):
            layer = model.get_submodule(module)
            assert isinstance(layer, nn.Linear)
            delta = tensors[f"{module}.lora_B.weight"].float() @ tensors[name].float()
            weight = layer.weight.float() + strength * delta.to(layer.weight.device)
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def write_full(path: Path, base: TensorSource, trained: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """A single-file checkpoint in the original layout: the base's other components beside the trained transformer.

    dtype: of the trained tensors; the others keep theirs. Written tensor by tensor: host memory holds one
    beside `trained`.
    """
    shapes = base.shapes if isinstance(base, CheckpointFile) else expected_tensors(base)
    replaced = {transformer_original_name(name): tensor for name, tensor in trained.items()}
    unknown = sorted(replaced.keys() - shapes.keys())
    if unknown:
        raise DataError(f"{len(unknown)} trained tensors are not in the base checkpoint (first: {unknown[0]})")
    kept = base.dtypes if isinstance(base, CheckpointFile) else {}
    types = {name: _NAMES[dtype] if name in replaced else kept.get(name, "F32") for name in shapes}

    def value(name: str) -> Tensor:
        if name in replaced:
            trained_tensor = replaced[name].detach().to("cpu", dtype)
            if not bool(torch.isfinite(trained_tensor).all()):
                raise DataError(f"{name} is not finite: nothing was written")
            return trained_tensor
        return base.read(name, shapes[name], torch.device("cpu"))

    _write_streamed(path, shapes, types, value, {"config": json.dumps(base.config), "model_version": "2.3.0"})


def _write_streamed(
    path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], value: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:  # fmt: skip
    """The safetensors format by hand, because the library wants every tensor in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * _SIZES[types[name]]
        header[name] = {"dtype": types[name], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in shapes:
                file.write(value(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SIZES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
