"""`ltx-train lora`: makes LoRA files of others, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx_train.assembly import model_source, outputs
from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit
from ltx_train.model import lora_file, lora_formats, lora_tools
from ltx_train.model.checkpoint import CheckpointFile, TensorSource
from ltx_train.model.export import TRAINER
from ltx_train.model.loaders import TRANSFORMER_PREFIX, transformer_original_name
from ltx_train.model.lora_tools import Stream

# What stays true of a file whose weights change.
_KEPT = ("base_fingerprint", "mode", "trigger", "merged_before", "reference_downscale_factor",
         "reference_temporal_scale_factor")  # fmt: skip


def run(config: Config) -> int:
    """Writes lora.out, one for each stream with `split`."""
    chosen, out = config.lora, Path(config.lora.out)
    made, metadata, remark = _made(config)
    metadata = {name: value for name, value in metadata.items() if name in _KEPT} | {"trainer": TRAINER}
    written: list[Path] = []
    for stream, tensors in made.items():
        path = out if stream is None else out.with_name(f"{out.stem}-{stream.value}{out.suffix}")
        outputs.check_output(config, "lora.out", str(path))
        written.append(lora_formats.write(path, tensors, metadata, chosen.format))
        print(f"{written[-1]}: {len(tensors)} tensors{remark}")
    close(written[-1], f"ltx-train inspect ... inspect.file={written[-1]}")
    return Exit.DONE


def _made(config: Config) -> tuple[dict[Stream | None, dict[str, Tensor]], Mapping[str, str], str]:
    """The tensors of each file to write, the metadata of the first file that was read, and a remark."""
    chosen = config.lora
    if chosen.do == "extract":
        return _extracted(config)
    read = [lora_file.read_lora(path) for path in chosen.files]
    tensors, metadata = read[0]
    if chosen.do == "merge":
        strengths = chosen.strengths or [1.0] * len(read)
        files = [(some, strength) for (some, _), strength in zip(read, strengths, strict=True)]
        return {None: lora_tools.merged(files)}, metadata, ""
    if len(read) > 1:
        raise ConfigError(f"lora.do={chosen.do} takes one file, and lora.files has {len(read)}")
    if chosen.do == "split":
        return {stream: part for stream, part in lora_tools.split(tensors).items()}, metadata, ""  # noqa: C416
    if chosen.do == "scale":
        return {None: lora_tools.scaled(tensors, streams(chosen.strength_of, *chosen.strengths))}, metadata, ""
    if chosen.do == "plain":
        source = model_source.weights(config)
        shapes = _shapes(config)
        weights = {m: _weight(source, m, shapes[m]) for m in sorted({lora_file.module_of(name) for name in tensors})}
        made, lost = lora_tools.plain(tensors, weights, chosen.rank)
    else:
        made, lost = lora_tools.resized(tensors, chosen.rank)
    return {None: made}, metadata, f", {100 * lost:.2g} % of the norm is lost"


def streams(strength_of: Mapping[str, float], common: float = 1.0) -> dict[Stream, float]:
    """The strength of every stream."""
    return {stream: common * strength_of.get(stream.value, 1.0) for stream in Stream}


def _extracted(config: Config) -> tuple[dict[Stream | None, dict[str, Tensor]], Mapping[str, str], str]:
    base, tuned = model_source.weights(config), CheckpointFile.open(config.lora.tuned or "")
    pairs = ((m, _weight(base, m, shape), _weight(tuned, m, shape)) for m, shape in _shapes(config).items())
    made, lost = lora_tools.extracted(pairs, config.lora.rank, torch.bfloat16)
    metadata = {"base_fingerprint": base.fingerprint(TRANSFORMER_PREFIX)}
    return {None: made}, metadata, f", {100 * lost:.2g} % of the norm is lost"


def _shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer."""
    layers = {n: m for n, m in model_source.skeleton(config).named_modules() if isinstance(m, nn.Linear)}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def _weight(source: TensorSource, module: str, shape: tuple[int, int]) -> Tensor:
    return source.read(transformer_original_name(f"{module}.weight"), shape, torch.device("cpu"))
