"""`ltx-train export`: a run's trained weights as a file for others."""

from __future__ import annotations

from pathlib import Path

from ltx_train import config as configuration
from ltx_train.commands import session
from ltx_train.commands.training import lora_metadata
from ltx_train.config import Config
from ltx_train.contracts import DataError, Exit
from ltx_train.model import export
from ltx_train.model.loaders import TRANSFORMER_PREFIX
from ltx_train.training import checkpointing
from ltx_train.training.checkpointing import Checkpoint


def run(config: Config) -> int:
    """LoRA runs give a ComfyUI-loadable LoRA, full runs a single-file checkpoint in the original layout."""
    folder = Path(config.export.run) if config.export.run else session.run_dir(config)
    trained_with, checkpoint = open_run(folder, config.export.step)
    source = session.weights(trained_with)
    kind = trained_with.adapter.kind
    default = folder / f"{trained_with.run.experiment}-{kind}-step-{checkpoint.step:06d}.safetensors"
    out = Path(config.export.out) if config.export.out else default
    if kind == "full":
        export.write_full(out, source, checkpoint.weights, session.dtype(trained_with))
    else:
        lora = session.lora(trained_with)
        base = checkpoint.notes.get("base", source.fingerprint(TRANSFORMER_PREFIX))
        tensors = export.lora_tensors(checkpoint.published, lora, session.dtype(trained_with))
        export.write(out, tensors, lora_metadata(trained_with, checkpoint.step, base))
    print(f"wrote {out}: {kind} weights of step {checkpoint.step}")
    return Exit.DONE


def open_run(folder: Path, step: int | None) -> tuple[Config, Checkpoint]:
    """A run's own configuration and one of its checkpoints, the newest by default."""
    found = checkpointing.committed(folder / "checkpoints")
    if not found:
        raise DataError(f"no checkpoint in {folder}: run `ltx-train fit` first, or set export.run to a run folder")
    wanted = found[-1] if step is None else folder / "checkpoints" / f"step-{step:06d}"
    if wanted not in found:
        there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in found)
        raise DataError(f"{folder} has no checkpoint of step {step}; there are: {there}")
    return configuration.load(folder / "config.yaml"), checkpointing.load(wanted)
