"""LoRA files: reading them, checking that they bind to a base, and merging them into a weight.

Owns the names and scales in LoRA files, including those of other trainers. Knows no adapter layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ltx_train.contracts import DataError
from ltx_train.model import sealed

LORA_PREFIX = "diffusion_model."
DORA = "dora_scale"
_KNOWN = re.compile(r"\.lora_[AB]\.weight$|\.dora_scale$|\.alpha$")


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name (`<module>.lora_A.weight`), and metadata. DataError if the file is not a readable LoRA."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no LoRA at {path}")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}): it may be truncated") from error
    try:
        sealed.verify(tensors, metadata)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    foreign = [name for name in tensors if not _KNOWN.search(name)]
    if foreign or not tensors:
        raise DataError(f"{path} is not a LoRA: {foreign[0] if foreign else 'it holds no tensors'}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DataError(f"{path}: {len(broken)} tensors are not finite (first: {broken[0]})")
    return _folded({name.removeprefix(LORA_PREFIX): tensor for name, tensor in tensors.items()}), metadata


def _folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the alphas that other trainers store: multiplies B by alpha / rank."""
    alphas = {name.removesuffix(".alpha"): float(t) for name, t in tensors.items() if name.endswith(".alpha")}
    folded = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for module, alpha in alphas.items():
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if down in folded and up in folded:
            folded[up] = (folded[up].float() * (alpha / folded[down].shape[0])).to(folded[up].dtype)
    return folded


def module_of(name: str) -> str:
    """The module name in the name of a LoRA tensor."""
    return name.removesuffix(f".{DORA}") if name.endswith(DORA) else name.rpartition(".lora_")[0]


def unbound_keys(tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Every reason why a LoRA does not fit a model: unknown modules, a missing A or B, wrong shapes.

    The model may be on the meta device.
    """
    linears = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    problems: list[str] = []
    for name, tensor in tensors.items():
        module = module_of(name)
        halves = [f"{module}.lora_{half}.weight" for half in "AB"]
        if module not in linears:
            problems.append(f"{name}: the base has no such module")
        elif any(half not in tensors for half in halves):
            problems.append(f"{name}: its other half is missing")
        else:
            layer, rank = linears[module], tensors[halves[0]].shape[0]
            shapes = {halves[0]: (rank, layer.in_features), halves[1]: (layer.out_features, rank)}
            expected = shapes.get(name, (layer.out_features, 1))
            if tuple(tensor.shape) != expected:
                problems.append(f"{name}: shape {list(tensor.shape)}, the base needs {list(expected)}")
    return problems


def refuse_unbound(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """DataError lists the keys that do not bind."""
    problems = unbound_keys(tensors, model)
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "\n  ".join(problems[:10])
        raise DataError(f"{len(problems)} of {len(tensors)} keys do not bind to the base:\n  {listed}{more}")


def merged_weight(weight: Tensor, tensors: Mapping[str, Tensor], module: str, strength: float) -> Tensor:
    """W + strength * B A in W's dtype. If the file has DoRA's magnitudes, the rows are scaled to these norms."""
    a, b = (tensors[f"{module}.lora_{half}.weight"].float().to(weight.device) for half in "AB")
    total = weight.float() + strength * (b @ a)
    magnitude = tensors.get(f"{module}.{DORA}")
    if magnitude is not None:
        norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
        total = total * (magnitude.float().to(weight.device) / norms)
    return total.to(weight.dtype)
