"""Which clips a run generates: those of `eval.prompts`, and held-out samples with noise in place of what is generated.

Owns their places, titles and inputs. All encoders work here, before the model is loaded; none stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ltx_train import config as configuration
from ltx_train.assembly import encoder_builder, from_config, requests
from ltx_train.assembly.requests import SampleRequest
from ltx_train.assembly.setup import Setup
from ltx_train.config import Config
from ltx_train.contracts import Batch, ModalityName
from ltx_train.data.collate import collate
from ltx_train.data.index import Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader
from ltx_train.evaluation import heldout
from ltx_train.model.transformer import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedClip:
    """place: folder and name below `samples`. config: its `sample` settings hold for this clip. given: latents that it
    is looked at beside, by name: the real clip and its references."""

    place: str
    title: str
    config: Config
    request: SampleRequest
    given: Mapping[str, Pair]


def prompted(setup: Setup) -> list[PlannedClip]:
    """The clips of `eval.prompts`. The leading rank encodes for all. UserError where the encoders cannot."""
    configs = configuration.prompted(setup.config)
    if not configs:
        return []
    return [
        PlannedClip(
            place=f"prompts/{number:02d}", title=f"{made.sample.prompt} (clip {number}, seed {made.sample.seed})",
            config=made, request=request, given={},
        )
        for number, (made, request) in enumerate(
            zip(configs, setup.ranks.lead(lambda: _encoded(setup, configs)), strict=True), 1
        )
    ]  # fmt: skip


def of_heldout(setup: Setup, root: Path, index: Index) -> list[PlannedClip]:
    """The first `eval.samples` held-out clips: their captions, references and conditions, and the noise of
    sample.seed.

    The text encoder is needed only where guidance moves away from a negative prompt.
    """
    config = setup.config
    if not config.eval.samples:
        return []
    settings = from_config.measurement_settings(config, from_config.grid(config, index))
    records = heldout.heldout_records(index, settings)[: config.eval.samples]
    reader = Reader(root, index, seed=settings.seed, request=heldout.read_request(settings))
    batches = [collate([reader.sample(Address(record.key, 0))]) for record in records]
    away = negative(setup)
    return [
        PlannedClip(
            place=f"heldout/{record.key}", title=f"{record.speaker}: {record.caption}", config=config,
            request=requests.of_batch(config.mode, batch, away, record.fps), given=_given(config, batch),
        )
        for record, batch in zip(records, batches, strict=True)
    ]  # fmt: skip


def negative(setup: Setup) -> Mapping[str, Tensor] | None:
    """The contexts of sample.negative_prompt; None where guidance needs none."""
    if not requests.guidance(setup.config).needs_negative:
        return None
    return setup.ranks.lead(lambda: _negative(setup))


def _encoded(setup: Setup, configs: Sequence[Config]) -> list[SampleRequest]:
    """The text encoder comes first and goes before the others come."""
    encoders = encoder_builder.encoders(setup.config, setup.ranks)
    texts = [requests.contexts(config, encoders) for config in configs]
    encoders.release_text()
    return [requests.request(config, encoders, text) for config, text in zip(configs, texts, strict=True)]


def _negative(setup: Setup) -> Mapping[str, Tensor]:
    encoders = encoder_builder.encoders(setup.config, setup.ranks)
    made = encoders.caption(setup.config.sample.negative_prompt)
    encoders.release_text()
    return made


def _given(config: Config, batch: Batch) -> dict[str, Pair]:
    """The real clip as its latents are decoded, and each of its references."""
    video, audio = (None if latent is None else latent[0] for latent in (batch.video_latent, batch.audio_latent))
    found: dict[str, Pair] = {}
    for condition in config.mode.references:
        latent = batch.references[condition.name][0]
        name = f"reference: {condition.stream.value}, {condition.source}"
        found[name] = (latent, None) if condition.stream is ModalityName.video else (None, latent)
    return {**found, "real": (video, audio)}
