"""`ltx-train export`: a run's trained weights as a file for other programs."""

from __future__ import annotations

from pathlib import Path

from ltx_train.assembly import from_config, hub_folder, hub_upload, model_source, outputs, publishing, resolve
from ltx_train.assembly.closing import close
from ltx_train.assembly.saved_run import open_run
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.model import export
from ltx_train.model.loaders import TRANSFORMER_PREFIX


def run(config: Config) -> int:
    """Writes a LoRA that ComfyUI loads, or for a full fine-tune a single-file checkpoint in the original layout."""
    outputs.check_output(config, "export.out", config.export.out)
    if config.export.hub_repo is not None:
        hub_upload.check(config.export.hub_repo)
    folder = Path(config.export.run) if config.export.run else from_config.run_dir(config)
    trained_with, checkpoint = open_run(folder, config.export.step)
    source, kind = model_source.weights(trained_with), resolve.trained_kind(trained_with)
    default = folder / f"{trained_with.run.experiment}-{kind}-step-{checkpoint.step:06d}.safetensors"
    out = Path(config.export.out) if config.export.out else default
    if resolve.trains_all_weights(trained_with):
        export.write_full(out, source, checkpoint.weights, from_config.dtype(trained_with))
        next_command = f"ltx-train sample ... model.path={out}"
    else:
        base = checkpoint.notes.get("base", source.fingerprint(TRANSFORMER_PREFIX))
        out = publishing.write_lora(
            trained_with,
            out,
            checkpoint.step,
            checkpoint.published,
            base=base,
            strength_of=config.export.strength_of,
            kind=config.export.format,
        )
        next_command = f"ltx-train inspect {folder} inspect.file={out}"
    if not resolve.trains_all_weights(trained_with) and trained_with.adapter.dora:
        print("the file has DoRA's magnitudes: ComfyUI reads them, diffusers and the reference implementation do not")
        print(f"for those: ltx-train lora lora.do=plain lora.files=[{out}]")
    if config.export.hub_folder is not None:
        _publish(config, hub_folder.write(trained_with, folder, out, Path(config.export.hub_folder)))
    print(f"{kind} weights of step {checkpoint.step}")
    close(out, next_command)
    return Exit.DONE


def _publish(config: Config, folder: Path) -> None:
    print(f"made {folder}")
    if config.export.hub_repo is not None:
        print(f"uploaded to {hub_upload.upload(folder, config.export.hub_repo, private=config.export.hub_private)}")
