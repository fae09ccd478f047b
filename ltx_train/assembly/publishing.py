"""A run's adapter as a file that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ltx_train.assembly import from_config, resolve
from ltx_train.config import Config
from ltx_train.model import export, lora_formats, lora_tools
from ltx_train.model.lora_file import LORA_PREFIX
from ltx_train.model.lora_tools import Stream

_FULL: Mapping[str, float] = {}


def publish(config: Config, folder: Path, step: int, weights: Mapping[str, Tensor], *, base: str) -> None:
    """Writes `adapters/step-N.safetensors` for every committed step of an adapter run. base: the base's
    fingerprint."""
    if not resolve.trains_all_weights(config):
        path = folder / "adapters" / f"step-{step:06d}.safetensors"
        write_lora(config, path, step, weights, base=base)


def write_lora(
    config: Config, path: Path, step: int, weights: Mapping[str, Tensor], *, base: str,
    strength_of: Mapping[str, float] = _FULL, kind: str = "comfyui",
) -> Path:  # fmt: skip
    """The LoRA file of a step, in the original module names with alpha folded in. strength_of: factors by stream.
    Returns what was written: a folder in peft's format."""
    named = export.lora_tensors(weights, from_config.lora(config), from_config.dtype(config))
    tensors = {name.removeprefix(LORA_PREFIX): tensor for name, tensor in named.items()}
    by_stream = {Stream(name): strength for name, strength in strength_of.items()}
    metadata = lora_metadata(config, step, base)
    return lora_formats.write(path, lora_tools.scaled(tensors, by_stream), metadata, kind)


def lora_metadata(config: Config, step: int, base: str) -> dict[str, str]:
    """The metadata of a LoRA file; values are strings, as safetensors requires."""
    facts = from_config.mode_facts(config)
    return {
        "rank": str(config.adapter.rank), "alpha": f"{config.adapter.alpha:g}",
        "alpha_folded": "true", "targets": ",".join(config.adapter.targets), "base_fingerprint": base,
        "step": str(step), "mode": ";".join(f"{k}={v}" for k, v in facts.items()),
        "trigger": config.data.trigger or "", "merged_before": Path(config.model.merge or "").name,
        "trainer": export.TRAINER, **_reference_scales(config),
    }  # fmt: skip


def _reference_scales(config: Config) -> dict[str, str]:
    """How much smaller and slower the control videos of an in-context LoRA are: programs that use it subsample theirs
    by these numbers. References that differ have a number each, under names that no program mistakes."""
    videos = [c for c in config.mode.references if c.stream == "video"]
    kinds = {
        "reference_downscale_factor": [c.spatial_scale or config.data.reference_scale for c in videos],
        "reference_temporal_scale_factor": [c.temporal_scale or config.data.reference_stride for c in videos],
    }
    facts: dict[str, str] = {}
    for name, factors in kinds.items():
        if len(set(factors)) == 1:
            facts[name] = str(factors[0])
        facts |= {f"{name}/{c.source}": str(f) for c, f in zip(videos, factors, strict=True) if len(set(factors)) > 1}
    return facts


def newest_adapter(folder: Path) -> Path | None:
    """The LoRA file of a run's newest step, None where there is none."""
    files = sorted((folder / "adapters").glob("step-*.safetensors"))
    return files[-1] if files else None
