"""`ltx-train sample`: video with sound from text, a first frame, a reference voice or an audio file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ltx_train.assembly import encoder_builder, model_builder, model_source, outputs, requests, resolve
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config, sample_bucket
from ltx_train.contracts import DataError, Exit
from ltx_train.model import export, lora_file, lora_tools
from ltx_train.model.loaders import TRANSFORMER_PREFIX
from ltx_train.model.lora_tools import Stream
from ltx_train.model.transformer import Transformer


def run(config: Config) -> int:
    """Writes sample.out. The encoders are freed before the transformer is loaded, and that before the decoders."""
    outputs.check_output(config, "sample.out", config.sample.out)
    _check_adapter(config)
    encoders = encoder_builder.encoders(config, bucket=sample_bucket(config))
    texts = requests.contexts(config, encoders)
    encoders.release_text()
    request = requests.request(config, encoders, texts)
    del encoders
    device = resolve.device(config)
    transformer = _transformer(config)
    latents = requests.generate(transformer, config, request, device)
    del transformer
    decoder = encoder_builder.decoder(config, device, sample_bucket(config))
    requests.write(decoder, request, latents, Path(config.sample.out))
    close(config.sample.out, sample_command(config.sample.adapter, f"sample.seed={config.sample.seed + 1}"))
    return Exit.DONE


def _check_adapter(config: Config) -> None:
    """DataError for a LoRA of another base, and a line for a prompt without its trigger word: before anything loads."""
    file = config.sample.adapter
    if file is None:
        return
    _, metadata = lora_file.read_lora(file)
    trained_on = metadata.get("base_fingerprint")
    if trained_on is not None and trained_on != model_source.weights(config).fingerprint(TRANSFORMER_PREFIX):
        raise DataError(f"{file} was trained on another base than {config.model.path}: set model.path to that base")
    trigger = metadata.get("trigger", "")
    if trigger and trigger.lower() not in config.sample.prompt.lower():
        print(f"ltx-train: the LoRA was trained with the word {trigger!r}, and the prompt lacks it", file=sys.stderr)


def _transformer(config: Config) -> Transformer:
    buckets = [config.sample.bucket] if config.sample.bucket else config.data.buckets[:1]
    setup = forward_only(replace(config, data=replace(config.data, buckets=buckets)))
    transformer = model_builder.open_frozen(setup)
    if config.sample.adapter is not None:
        tensors, _ = lora_file.read_lora(config.sample.adapter)
        by_stream = {Stream(name): strength for name, strength in config.sample.strength_of.items()}
        export.bind(transformer, lora_tools.scaled(tensors, by_stream), config.sample.strength)
    return transformer.eval()
