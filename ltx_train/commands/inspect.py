"""`ltx-train inspect`: checks that a LoRA file binds to a base and reproduces the trained adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ltx_train import rng
from ltx_train.assembly import from_config, model_source, outputs
from ltx_train.assembly.closing import close
from ltx_train.assembly.saved_run import open_run
from ltx_train.config import Config
from ltx_train.contracts import DataError, Exit, Modality
from ltx_train.diffusion import positions
from ltx_train.evaluation import lora_page
from ltx_train.model import adapter, export, lora_file, lora_tools
from ltx_train.model.checkpoint import TensorSource
from ltx_train.model.loaders import TRANSFORMER_PREFIX, load_transformer, transformer_original_name
from ltx_train.model.transformer import Pair, Transformer

_TOLERANCE = 1e-5


def run(config: Config) -> int:
    """Raises DataError (exit code 78) when keys do not bind, the base is a different one, or the outputs differ."""
    assert config.inspect.file is not None  # config.require has refused it
    outputs.check_output(config, "inspect.page", config.inspect.page)
    tensors, metadata = lora_file.read_lora(config.inspect.file)
    source = model_source.weights(config)
    problems = lora_file.unbound_keys(tensors, model_source.skeleton(config))
    print(f"{config.inspect.file}: {len(tensors)} tensors")
    for name, value in sorted(metadata.items()):
        print(f"  {name}: {value}")
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems)} of {len(tensors)} keys do not bind to the base:\n  {listed}")
    _refuse_absent(config, source, tensors)
    print(f"  every key binds to {config.model.path or 'the random base'}")
    _refuse_other_base(config, metadata, source)
    for stream, part in lora_tools.split(tensors).items():
        sizes = lora_tools.norms(part)
        largest = max(sizes, key=lambda module: sizes[module])
        total = sum(size**2 for size in sizes.values()) ** 0.5
        print(f"  {stream.value}: {len(sizes)} layers, norm {total:.4g}, most in {largest} ({sizes[largest]:.3g})")
    files = {Path(config.inspect.file).name: tensors}
    if config.inspect.compare is not None:
        other, _ = lora_file.read_lora(config.inspect.compare)
        files[config.inspect.compare] = other
        for stream, cosine in lora_tools.likeness(tensors, other).items():
            print(f"  {stream.value}: cosine with {config.inspect.compare} {cosine:+.3f}")
    if config.inspect.run is not None:
        _compare_outputs(config, source, tensors, config.export.step or _step_of(metadata))
    if config.inspect.page is not None:
        norms = {
            name: {stream.value: blocks for stream, blocks in lora_tools.norms_by_block(own).items()}
            for name, own in files.items()
        }
        lora_page.write(Path(config.inspect.page), f"{Path(config.inspect.file).name}: what it changes", norms)
        print(f"made {config.inspect.page}")
    run_folder = f" {config.inspect.run}" if config.inspect.run else " ..."
    close(None, f"ltx-train sample{run_folder} sample.adapter={config.inspect.file}")
    return Exit.DONE


def _refuse_absent(config: Config, source: TensorSource, tensors: Mapping[str, torch.Tensor]) -> None:
    """DataError when the base's file lacks the weights that its configuration describes."""
    names = {transformer_original_name(f"{lora_file.module_of(name)}.weight") for name in tensors}
    absent = sorted(names - source.names([TRANSFORMER_PREFIX])) if config.model.weights == "file" else []
    if absent:
        count, first = len(absent), absent[0]
        raise DataError(f"{config.model.path} lacks {count} of the weights that the LoRA changes (first: {first})")


def _compare_outputs(config: Config, source: TensorSource, tensors: dict[str, torch.Tensor], step: int | None) -> None:
    """DataError when the file and the run's checkpoint of that step compute different outputs."""
    run = Path(config.inspect.run or "")
    if step is not None and not (run / "checkpoints" / f"step-{step:06d}").is_dir():
        print(f"  {run} no longer has the checkpoint of step {step}: the trainer's output is not compared")
        return
    difference = _difference(config, source, tensors, step)
    print(f"  base + LoRA against the trainer's output: max. abs. difference {difference:.2e} (float32)")
    if not difference <= _TOLERANCE:
        raise DataError(
            f"the exported LoRA does not reproduce the trainer's output ({difference:.2e} > {_TOLERANCE:g})"
        )


def _step_of(metadata: dict[str, str]) -> int | None:
    """The optimizer step that the file was saved at, None if it does not have one."""
    step = metadata.get("step", "")
    return int(step) if step.isdigit() else None


def _refuse_other_base(config: Config, metadata: Mapping[str, str], source: TensorSource) -> None:
    if model_source.is_other_base(config, metadata):
        trained_on, now = metadata["base_fingerprint"], source.fingerprint(TRANSFORMER_PREFIX)
        raise DataError(f"the LoRA was trained on another base (fingerprint {trained_on}, this base is {now})")


def _difference(config: Config, source: TensorSource, tensors: dict[str, torch.Tensor], step: int | None) -> float:
    """Largest output difference between the base with the file merged in and with the adapter of the run's checkpoint
    `step`, on one input."""
    trained_with, checkpoint = open_run(Path(config.inspect.run or ""), step)
    trainer = load_transformer(source, dtype=torch.float32)
    adapter.attach(trainer, from_config.lora(trained_with), trained_with.run.seed)
    adapter.load_state(trainer, _rounded(checkpoint.published, tensors, trained_with))
    merged = load_transformer(source, dtype=torch.float32)
    export.merge(merged, tensors)
    with torch.no_grad():
        pairs = zip(_probe(trainer.eval()), _probe(merged), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None)


def _rounded(
    weights: Mapping[str, torch.Tensor], exported: Mapping[str, torch.Tensor], config: Config
) -> dict[str, torch.Tensor]:
    """Rounds the trained weights to the file's dtype, so that the comparison covers only binding and scale."""
    lora, rounded = from_config.lora(config), dict[str, torch.Tensor]()
    dtype = next(iter(exported.values())).dtype
    for name, tensor in weights.items():
        factor = lora.scale_of(lora_file.module_of(name)) if ".lora_B." in name else 1.0
        rounded[name] = (tensor.float() * factor).to(dtype).float() / factor
    return rounded


def _probe(transformer: Transformer) -> Pair:
    """The transformer's output on a small input of both modalities with keyed noise."""
    config = transformer.config
    video = _modality(positions.video(2, 2, 2, 24.0), config["in_channels"], config["cross_attention_dim"], "video")
    audio = _modality(positions.audio(9), config["audio_in_channels"], config["audio_cross_attention_dim"], "audio")
    return transformer(video, audio)


def _modality(bounds: torch.Tensor, channels: int, width: int, name: str) -> Modality:
    tokens = bounds.shape[1]
    latent = rng.normal((1, tokens, channels), 0, "inspect", name)
    context = rng.normal((1, 128, width), 0, "inspect/context", name)
    return Modality(
        latent=latent,
        timesteps=torch.full((1, tokens), 0.5),
        sigma=torch.full((1,), 0.5),
        positions=bounds[None],
        context=context,
    )
