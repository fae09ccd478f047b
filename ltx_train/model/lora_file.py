"""LoRA files: reading them, checking that they bind to a base, and merging them into a weight.

Owns the names and scales in LoRA files, including those of other trainers. Knows no adapter layers.
"""

from __future__ import annotations

import json
import math
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
# What other programs put before a module's name, and how they name both halves.
_PREFIXES = (LORA_PREFIX, "base_model.model.", "transformer.", "model.")
_HALVES = {
    ".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_A.weight", ".lora_B.default.weight": ".lora_B.weight",
}  # fmt: skip
_KOHYA = "lora_unet_"
# Layers outside the blocks have other names in diffusers.
_IN_DIFFUSERS = {
    "patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in", "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed", "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}  # fmt: skip
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in _IN_DIFFUSERS.items()}


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name (`<module>.lora_A.weight`), and metadata. DataError if the file is not a readable LoRA.

    Also a folder of peft, with its adapter_config.json, and the names that diffusers and kohya's scripts give.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
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
    tensors = {_plain_name(name): tensor for name, tensor in tensors.items()}
    foreign = [name for name in tensors if not _KNOWN.search(name)]
    if foreign or not tensors:
        raise DataError(f"{path} is not a LoRA: {foreign[0] if foreign else 'it holds no tensors'}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DataError(f"{path}: {len(broken)} tensors are not finite (first: {broken[0]})")
    return _folded(tensors), metadata


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A peft folder: its scale is alpha / rank, or alpha / sqrt(rank), of adapter_config.json."""
    try:
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha, root = int(settings["r"]), float(settings["lora_alpha"]), bool(settings.get("use_rslora"))
        if settings.get("rank_pattern") or settings.get("alpha_pattern"):
            raise DataError(f"{path}: rank_pattern and alpha_pattern of peft are not read: export a single file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no folder of peft: it has no readable adapter_config.json ({error})") from error
    tensors, metadata = read_lora(path / "adapter_model.safetensors")
    scale = alpha / (math.sqrt(rank) if root else rank)
    return {n: (t.float() * scale).to(t.dtype) if ".lora_B." in n else t for n, t in tensors.items()}, metadata


def diffusers_name(name: str) -> str:
    """The name of a tensor in diffusers, without the prefix."""
    first, dot, rest = name.partition(".")
    return _IN_DIFFUSERS.get(first, first) + dot + rest


def _plain_name(name: str) -> str:
    """The name of a tensor without what other programs add to it."""
    for theirs, ours in _HALVES.items():
        name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
    if name.startswith(_KOHYA):
        module, dot, part = name.removeprefix(_KOHYA).partition(".")
        return _dotted(module) + dot + part
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    if prefix:
        return _plain_name(name.removeprefix(prefix))
    first, dot, rest = name.partition(".")
    return _FROM_DIFFUSERS.get(first, first) + dot + rest


def _dotted(module: str) -> str:
    """A module's name from one whose dots became underscores: names of this model are known by their parts."""
    match = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", module)
    rest = match[2] if match else module
    part = next((p for p in _PARTS if rest == p or rest.startswith(f"{p}_")), None)
    if part is None:
        return module
    inner = rest.removeprefix(part).removeprefix("_")
    inner = {"to_out_0": "to_out.0", "net_0_proj": "net.0.proj", "net_2": "net.2"}.get(inner, inner)
    return ".".join(filter(None, [f"transformer_blocks.{match[1]}" if match else "", part, inner]))


_PARTS = (
    "audio_to_video_attn", "video_to_audio_attn", "audio_attn1", "audio_attn2", "audio_ff", "attn1", "attn2", "ff",
)  # fmt: skip


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
