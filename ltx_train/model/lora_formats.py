"""How LoRA files name their tensors for other programs.

Owns the names; `lora_file` reads them all. comfyui: `diffusion_model.<module>.lora_A.weight`, which the reference
implementation reads too. diffusers: `transformer.<module>`, with its names of layers outside the blocks. peft: a folder
with its configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.model import export, lora_file
from ltx_train.model.lora_file import DORA, LORA_PREFIX, module_of

PREFIXES = {"comfyui": LORA_PREFIX, "diffusers": "transformer.", "peft": "base_model.model."}
_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], kind: str) -> Path:
    """Writes a file, or with peft a folder of the path's name. Returns it. DataError where a format cannot hold the
    tensors."""
    theirs = lora_file.diffusers_name if kind == "diffusers" else str
    named = {PREFIXES[kind] + theirs(name): tensor for name, tensor in tensors.items()}
    if kind != "comfyui" and any(name.endswith(DORA) for name in tensors):
        raise DataError(f"{kind} does not read DoRA's magnitudes from such a file: lora.do=plain makes a plain LoRA")
    if kind != "peft":
        export.write(path, named, metadata)
        return path
    folder = path.with_suffix("")
    ranks = {module_of(name): tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    if len(set(ranks.values())) > 1:
        raise DataError("peft's format is written for adapters of one rank: resize the file first (lora.do=resize)")
    rank = next(iter(ranks.values()))
    export.write(folder / _WEIGHTS, named, metadata)
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "target_modules": sorted(ranks), "task_type": None, "base_model_name_or_path": None,
    }  # fmt: skip
    durable.write(folder / _SETTINGS, json.dumps(settings, indent=1))
    return folder
