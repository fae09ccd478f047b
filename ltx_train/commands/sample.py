"""`ltx-train sample`: video with sound from text, a first frame, a reference voice or an audio file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ltx_train import config as configuration
from ltx_train import durable
from ltx_train.assembly import encoder_builder, model_builder, model_source, outputs, requests, resolve, second_stage
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.requests import SampleRequest
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config, sample_bucket, two_stages
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
    stages = _requests(config, clips)
    latents = _generated(config, clips, stages)
    decoder = encoder_builder.decoder(config, resolve.device(config), _largest(clips))
    for made, (_, last), pair in zip(clips, stages, latents, strict=True):
        requests.write(decoder, last, pair, Path(made.sample.out))
        print(f"made {made.sample.out}")
    following = sample_command(config.sample.adapter, f"sample.seed={clips[-1].sample.seed + 1}")
    close(_page(config, clips) if len(clips) > 1 else None, following)
    return Exit.DONE


def _requests(config: Config, clips: Sequence[Config]) -> list[tuple[SampleRequest, SampleRequest]]:
    """Of each clip's first and last stage, which are the same where it has one. The text encoder goes before the others
    come."""
    encoders = encoder_builder.encoders(config, bucket=_largest(clips))
    texts = [requests.contexts(made, encoders) for made in clips]
    encoders.release_text()
    found: list[tuple[SampleRequest, SampleRequest]] = []
    for made, text in zip(clips, texts, strict=True):
        first = requests.request(two_stages.first_stage(made), encoders, text)
        staged = made.sample.upsampler is not None
        found.append((first, requests.request(made, encoders, text) if staged else first))
    return found


def _generated(
    config: Config, clips: Sequence[Config], stages: Sequence[tuple[SampleRequest, SampleRequest]]
) -> list[Pair]:
    """The latents of all clips. Each stage has its transformer to itself, and so has the upsampler between them."""
    device = resolve.device(config)
    latents: list[Pair] = []
    transformer = _transformer(config, _largest([two_stages.first_stage(made) for made in clips]))
    for made, (first, _) in zip(clips, stages, strict=True):
        with adapter.at_strength(transformer, made.sample.strength):
            latents.append(requests.generate(transformer, made, first, device))
    del transformer
    if config.sample.upsampler is None:
        return latents
    begun = second_stage.doubled(config, latents, device)
    transformer = _transformer(two_stages.second_stage(config), _largest(clips))
    refined: list[Pair] = []
    for made, (_, last), pair in zip(clips, stages, begun, strict=True):
        with adapter.at_strength(transformer, made.sample.strength):
            refined.append(second_stage.refine(transformer, made, last, pair, device))
    return refined


def _largest(clips: Sequence[Config]) -> Bucket:
    return max((sample_bucket(made) for made in clips), key=lambda b: b.video_tokens)


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
