"""Writes trained weights for other programs: a LoRA for ComfyUI and diffusers, or a full checkpoint.

Owns the exported names and metadata, and attaching or merging a LoRA file into a model. It must not know runs or
training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.model import adapter, sealed
from ltx_train.model.adapter import Lora
from ltx_train.model.checkpoint import CheckpointFile, TensorSource
from ltx_train.model.loaders import expected_tensors, transformer_original_name
from ltx_train.model.lora_file import DORA, LORA_PREFIX, merged_weight, module_of, refuse_unbound
from ltx_train.model.merged import MergedSource

# Value of `trainer` in the metadata of every exported file.
TRAINER = "ltx-train"


def lora_tensors(parameters: Mapping[str, Tensor], lora: Lora, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors as `diffusion_model.<module>.lora_A/B.weight`, in `dtype` on the CPU.

    B is multiplied by the scale, so that the file needs no alpha. DoRA's magnitudes become `<module>.dora_scale`
    (out, 1).
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        module, _, part = name.rpartition(".lora_")
        value, exported = parameter.detach().float(), name
        if part.startswith("B"):
            # Loaders assume a scale of 1 when the file has no alpha.
            value = value * lora.scale_of(module)
        elif part.startswith("magnitude"):
            value, exported = value[:, None], f"{module}.{DORA}"
        tensors[LORA_PREFIX + exported] = value.to(dtype).cpu().contiguous()
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically. DataError if writing fails or a tensor is not finite."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DataError(f"{len(broken)} tensors are not finite (first: {broken[0]}): nothing was written")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, sealed.seal(tensors, {"format": "pt", **metadata}))
        durable.sync(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
        durable.sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} could not be written ({error})") from error


def bind(model: nn.Module, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Attaches the tensors of a LoRA file to a model at `strength`. DataError lists the keys that do not bind."""
    refuse_unbound(tensors, model)
    ranks = {module_of(name): tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    dora = any(name.endswith(DORA) for name in tensors)
    lora = Lora(rank=1, alpha=1, dropout=0.0, targets=tuple(ranks), rank_pattern=ranks, alpha_pattern=ranks, dora=dora)
    adapter.attach(model, lora, seed=0)
    adapter.load_state(model, {_trained_name(n): _trained_shape(n, t) for n, t in tensors.items()})
    adapter.set_strength(model, strength)


def start_from(model: nn.Module, tensors: Mapping[str, Tensor], lora: Lora) -> list[str]:
    """Copies a LoRA file's weights into the attached adapter. Returns the adapter's layers that the file lacks.

    B is divided by the adapter's scale, which the forward pass applies again. DataError if the file has layers that are
    not trained, or another rank: no weight of the file may be lost.
    """
    parameters = adapter.lora_parameters(model)
    file_weights = {_trained_name(n): _trained_shape(n, t) for n, t in tensors.items()}
    extra = sorted({module_of(n) for n in file_weights if n not in parameters})
    if extra:
        raise DataError(
            f"adapter.start_from: the file has {len(extra)} layers that this run does not train (first: {extra[0]}); "
            "set adapter.targets and adapter.dora as in the run that trained it"
        )
    with torch.no_grad():
        for name, tensor in file_weights.items():
            if parameters[name].shape != tensor.shape:
                ours, theirs = list(parameters[name].shape), list(tensor.shape)
                raise DataError(f"adapter.start_from: {name} is {theirs} in the file and {ours} here: set adapter.rank")
            scale = lora.scale_of(module_of(name)) if ".lora_B." in name else 1.0
            parameters[name].copy_(tensor / scale)
    return sorted({module_of(n) for n in parameters if n not in file_weights})


def _trained_name(name: str) -> str:
    return f"{module_of(name)}.lora_magnitude_vector.weight" if name.endswith(DORA) else name


def _trained_shape(name: str, tensor: Tensor) -> Tensor:
    return tensor.float()[:, 0] if name.endswith(DORA) else tensor.float()


def merge(model: nn.Module, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Adds the LoRA to the weights in place, as loaders without adapter support do. The sum is formed in float32."""
    for module in sorted({module_of(name) for name in tensors}):
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        weight = merged_weight(layer.weight, tensors, module, strength)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def write_full(path: Path, base: TensorSource, trained: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a single-file checkpoint in the original layout: the trained transformer and the base's other components.

    dtype: of the trained tensors in the file; the other tensors keep theirs. The file is written tensor by tensor, so
    host memory holds one tensor in addition to `trained`.
    """
    file = base.inner if isinstance(base, MergedSource) else base
    shapes = file.shapes if isinstance(file, CheckpointFile) else expected_tensors(base)
    replaced = {transformer_original_name(name): tensor for name, tensor in trained.items()}
    unknown = sorted(replaced.keys() - shapes.keys())
    if unknown:
        raise DataError(f"{len(unknown)} trained tensors are not in the base checkpoint (first: {unknown[0]})")
    base_types = file.dtypes if isinstance(file, CheckpointFile) else {}
    types = {name: _NAMES[dtype] if name in replaced else base_types.get(name, "F32") for name in shapes}

    def value(name: str) -> Tensor:
        if name in replaced:
            trained_tensor = replaced[name].detach().to("cpu", dtype)
            if not bool(torch.isfinite(trained_tensor).all()):
                raise DataError(f"{name} is not finite: nothing was written")
            return trained_tensor
        return base.read(name, shapes[name], torch.device("cpu"))

    _write_streamed(path, shapes, types, value, {**_OF_FULL, "config": json.dumps(base.config)})


def _write_streamed(
    path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], value: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:  # fmt: skip
    """Writes the safetensors format directly, because the library needs all tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * _SIZES[types[name]]
        header[name] = {"dtype": types[name], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    # The tensors begin at a multiple of 8 bytes, because readers map them into memory.
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


_OF_FULL = {"model_version": "2.3.0", "trainer": TRAINER}
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
