"""`ltx-train sample`: video with sound from text, a first frame, a reference voice or an audio file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ltx_train.assembly import encoder_builder, model_builder, outputs, requests, resolve
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config, sample_bucket
from ltx_train.contracts import Exit
from ltx_train.model import export, lora_file
from ltx_train.model.transformer import Transformer


def run(config: Config) -> int:
    """Writes sample.out. The encoders are freed before the transformer is loaded, and that before the decoders."""
    outputs.check_output(config, "sample.out", config.sample.out)
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


def _transformer(config: Config) -> Transformer:
    buckets = [config.sample.bucket] if config.sample.bucket else config.data.buckets[:1]
    setup = forward_only(replace(config, data=replace(config.data, buckets=buckets)))
    transformer = model_builder.open_frozen(setup)
    if config.sample.adapter is not None:
        tensors, _ = lora_file.read_lora(config.sample.adapter)
        export.bind(transformer, tensors, config.sample.strength)
    return transformer.eval()
