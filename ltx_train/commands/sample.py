"""`ltx-train sample`: video with sound from text, a first frame, a reference voice or an audio file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train import durable
from ltx_train.assembly import encoder_builder, model_builder, model_source, outputs, requests, resolve
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.requests import SampleRequest
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config, sample_bucket
from ltx_train.contracts import Clip, DataError, Exit
from ltx_train.diffusion.grid import Bucket
from ltx_train.evaluation import report
from ltx_train.evaluation.report import Report
from ltx_train.evaluation.rows import Grid
from ltx_train.model import adapter, export, lora_file, lora_tools
from ltx_train.model.lora_tools import Stream
from ltx_train.model.transformer import Pair, Transformer


def run(config: Config) -> int:
    """Writes sample.out, or a file for each of several clips and a page with them. The encoders are freed before the
    transformer is loaded, and that before the decoders."""
    clips = configuration.sampled(config)
    for made in clips:
        outputs.check_output(made, "sample.out", made.sample.out)
        _check_adapter(made)
    if len(clips) > 1:
        outputs.check_output(config, "sample.out", str(_page_path(config)))
    bucket = max((sample_bucket(made) for made in clips), key=lambda b: b.video_tokens)
    encoders = encoder_builder.encoders(config, bucket=bucket)
    texts = [requests.contexts(made, encoders) for made in clips]
    encoders.release_text()
    inputs = [requests.request(made, encoders, text) for made, text in zip(clips, texts, strict=True)]
    del encoders
    device = resolve.device(config)
    transformer = _transformer(config, bucket)
    latents = [_generated(transformer, made, one, device) for made, one in zip(clips, inputs, strict=True)]
    del transformer
    decoder = encoder_builder.decoder(config, device, bucket)
    for made, one, pair in zip(clips, inputs, latents, strict=True):
        requests.write(decoder, one, pair, Path(made.sample.out))
        print(f"made {made.sample.out}")
    following = sample_command(config.sample.adapter, f"sample.seed={clips[-1].sample.seed + 1}")
    close(_page(config, clips) if len(clips) > 1 else None, following)
    return Exit.DONE


def _generated(transformer: Transformer, config: Config, request: SampleRequest, device: torch.device) -> Pair:
    with adapter.at_strength(transformer, config.sample.strength):
        return requests.generate(transformer, config, request, device)


def _page(config: Config, clips: Sequence[Config]) -> Path:
    """A page with the clips of each prompt side by side."""
    by_prompt: dict[str, list[Clip]] = {}
    for made in clips:
        shown = Clip(f"seed {made.sample.seed}", Path(made.sample.out))
        by_prompt.setdefault(made.sample.prompt or "no prompt", []).append(shown)
    path = _page_path(config)
    content = Report(title=path.stem, facts={}, metrics=[], subjects=[], grid=Grid((), ()), clips=by_prompt)
    durable.write(path, report.clips_page(content))
    return path


def _page_path(config: Config) -> Path:
    return Path(config.sample.out).with_suffix(".html")


def _check_adapter(config: Config) -> None:
    """DataError for a LoRA of another base, and a line for a prompt without its trigger word: before anything loads."""
    file = config.sample.adapter
    if file is None:
        return
    _, metadata = lora_file.read_lora(file)
    if model_source.is_other_base(config, metadata):
        raise DataError(f"{file} was trained on another base than {config.model.path}: set model.path to that base")
    trigger = metadata.get("trigger", "")
    if trigger and trigger.lower() not in config.sample.prompt.lower():
        print(f"ltx-train: the LoRA was trained with the word {trigger!r}, and the prompt lacks it", file=sys.stderr)


def _transformer(config: Config, bucket: Bucket) -> Transformer:
    buckets = [str(bucket)]
    setup = forward_only(replace(config, data=replace(config.data, buckets=buckets)))
    transformer = model_builder.open_frozen(setup)
    if config.sample.adapter is not None:
        tensors, _ = lora_file.read_lora(config.sample.adapter)
        by_stream = {Stream(name): strength for name, strength in config.sample.strength_of.items()}
        export.bind(transformer, lora_tools.scaled(tensors, by_stream))
    return transformer.eval()
