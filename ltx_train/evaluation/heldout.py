"""Held-out loss at fixed noise levels with fixed noise, for every arm of the comparison.

Owns the choice of comparisons. All compared losses use the same noise: correct, wrong and dropped
reference, another caption, adapter on and off, this checkpoint and the last.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_train import terminal
from ltx_train.contracts import Batch, Mode
from ltx_train.data.collate import collate
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader, ReadRequest
from ltx_train.data.record import Record
from ltx_train.diffusion import conditions, objective, transfer
from ltx_train.diffusion.loss import Weights
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.evaluation import alike
from ltx_train.evaluation.rows import CAPTION, CORRECT, DROPPED, NEUTRAL, OFF, WRONG, Row
from ltx_train.evaluation.share import ALL, Share
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer

# A reference that carries nothing, by condition name and shape (C, F, H, W) or (c, R, f).
Neutral = Mapping[tuple[str, tuple[int, ...]], Tensor]
_NONE: Neutral = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementSettings:
    """levels: the noise levels. wrong_references: other identities per sample; dropped, neutral, wrong_caption:
    whether to measure these arms. max_samples: number of clips, 0 for all. voice_variant: that of all voice references,
    None: as they were recorded. repeat: other noise for every number but 0; clips and references stay the same."""

    mode: Mode
    levels: tuple[float, ...]
    seed: int
    batch_size: int
    max_samples: int
    wrong_references: int
    video_weight: float
    audio_weight: float
    dropped: bool = True
    neutral: bool = False
    wrong_caption: bool = True
    voice_variant: str | None = None
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Arm:
    """One version of a batch: its name, its data, and whether its references are left out."""

    name: str
    batch: Batch
    without_references: bool = False


def measure(
    transformer: Transformer, root: str, index: Index, settings: MeasurementSettings, *, device: torch.device,
    with_base: bool, share: Share = ALL, neutral: Neutral = _NONE,
) -> list[Row]:  # fmt: skip
    """The rows of this process's share of the held-out split. neutral: its references for the arm of that name.
    Restores training mode and torch's random state."""
    reader = Reader(root, index, seed=settings.seed, request=read_request(settings))
    rows: list[Row] = []
    turns = list(share.turns(batches(index, settings)))
    with undisturbed(transformer), terminal.counted("measuring", len(turns)) as advance:
        for addresses, counts in turns:
            versions = list(arms(reader, addresses, settings, with_base, neutral=neutral))
            measured: list[Row] = []
            for arm in versions:
                off = adapter.disabled(transformer) if arm.name in OFF.values() else nullcontext()
                with off:
                    measured += _losses(transformer, arm, settings, device)
            for _ in range(share.missing(len(versions))):
                _losses(transformer, versions[0], settings, device)
            rows += measured if counts else []
            advance()
    return rows


def read_request(settings: MeasurementSettings) -> ReadRequest:
    """Request for the reader of a measurement: every clip's first caption, without caption dropout."""
    request = replace(ReadRequest.of([settings.mode]), variants=False)
    if settings.voice_variant is None:
        return request
    return replace(request, voice_variants=(settings.voice_variant,), voice_variant_share=1.0)


def heldout_records(index: Index, settings: MeasurementSettings) -> list[Record]:
    """The clips to measure, sorted by shape and key; every measurement takes the same ones.

    max_samples takes clips from all identities in turn, so that it covers as many identities as possible.
    """
    last_turn: dict[str, int] = {}
    clips_by_turn: list[tuple[int, Record]] = []
    for record in sorted(index.split(HELDOUT), key=lambda r: r.key):
        unit = index.unit(record)
        last_turn[unit] = last_turn.get(unit, -1) + 1
        clips_by_turn.append((last_turn[unit], record))
    chosen = [record for _, record in sorted(clips_by_turn, key=lambda c: (c[0], c[1].key))]
    chosen = chosen[: settings.max_samples] if settings.max_samples else chosen
    return sorted(chosen, key=lambda r: (r.shape, r.key))


def passes(index: Index, settings: MeasurementSettings, *, with_base: bool) -> tuple[int, int, int]:
    """Cost of a measurement: the number of clips, of noise levels, and the largest number of arms per clip."""
    references = bool(settings.mode.references)
    arms = 1 + (settings.dropped + settings.neutral + settings.wrong_references) * references
    captions = index.split(HELDOUT).distinct("context")
    arms += settings.wrong_caption and len(captions) > 1
    return len(heldout_records(index, settings)), len(settings.levels), arms * (1 + with_base)


def measured_on(index: Index, settings: MeasurementSettings, main: Sequence[float]) -> dict[str, float]:
    """Metrics that identify a measurement: clips, levels, noise, arms and weights. main: the levels of the held-out
    loss."""
    records = heldout_records(index, settings)
    clips = [(r.key, r.tensors.sha256, *(member.sha256 for member in r.contexts[:1])) for r in records]
    arms = [
        settings.dropped, settings.neutral, settings.wrong_references, settings.wrong_caption, settings.voice_variant,
        settings.repeat,
    ]  # fmt: skip
    weights = [settings.seed, settings.video_weight, settings.audio_weight]
    parts = [clips, settings.levels, list(main), arms, weights, repr(settings.mode)]
    return {alike.MEASURED_ON: alike.number(parts), alike.CLIPS: len(records), alike.LEVELS: len(main)}


def batches(index: Index, settings: MeasurementSettings) -> list[list[Address]]:
    """The held-out clips in batches; all clips of a batch share a bucket and a length."""
    records = heldout_records(index, settings)
    groups: list[list[Address]] = []
    for shape in sorted({r.shape for r in records}):
        keys = [Address(r.key, 0) for r in records if r.shape == shape]
        groups += [keys[start : start + settings.batch_size] for start in range(0, len(keys), settings.batch_size)]
    return groups


def arms(
    reader: Reader, addresses: list[Address], settings: MeasurementSettings, with_base: bool, *,
    neutral: Neutral = _NONE,
) -> Iterator[Arm]:  # fmt: skip
    """The unchanged batch, then every arm that is compared with it; with_base: each with the adapter off, too."""
    for arm in _arms(reader, addresses, settings, neutral):
        yield arm
        if with_base:
            yield replace(arm, name=OFF[arm.name])


def _arms(reader: Reader, addresses: list[Address], settings: MeasurementSettings, neutral: Neutral) -> Iterator[Arm]:
    correct = collate([reader.sample(a) for a in addresses])
    yield Arm(CORRECT, correct)
    if settings.mode.references:
        if settings.dropped:
            yield Arm(DROPPED, correct, without_references=True)
        if settings.neutral and neutral:
            yield Arm(NEUTRAL, _with_neutral(correct, neutral))
        others = [reader.others(a, settings.wrong_references) for a in addresses]
        # A sample with fewer other identities than wrong_references repeats them, so that its numbers do not depend
        # on the rest of its batch.
        for number in range(settings.wrong_references if all(others) else 0):
            pairs = zip(addresses, others, strict=True)
            yield Arm(WRONG, collate([reader.with_references_of(a, keys[number % len(keys)]) for a, keys in pairs]))
    if settings.wrong_caption:
        captions = [reader.other_caption(a) for a in addresses]
        named = [(a, key) for a, key in zip(addresses, captions, strict=True) if key is not None]
        if len(named) == len(addresses):
            yield Arm(CAPTION, collate([reader.with_caption_of(a, key) for a, key in named]))


def _with_neutral(batch: Batch, neutral: Neutral) -> Batch:
    replaced = {
        name: neutral[name, tuple(latent.shape[1:])].expand_as(latent) for name, latent in batch.references.items()
    }
    return replace(batch, references=replaced)


def inputs(arm: Arm, settings: MeasurementSettings, sigma: float, device: torch.device) -> conditions.ModelInputs:
    """The arm's batch at one noise level; the noise depends on seed and sample only."""
    # The distribution has no effect: `sigma` replaces the drawn levels.
    seed = settings.seed + settings.repeat
    draws = conditions.draw(arm.batch, settings.mode, SigmaDistribution(), seed, sigma=sigma)
    if arm.without_references:
        draws = conditions.without_references(settings.mode, draws)
    return transfer.to_device(conditions.assemble(arm.batch, settings.mode, draws), device)


@contextmanager
def undisturbed(transformer: Transformer) -> Generator[None]:
    """Evaluation mode without gradients; on exit, restores training mode and torch's random state."""
    training = transformer.training
    state = torch.get_rng_state()
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train(training)
        torch.set_rng_state(state)


def _losses(transformer: Transformer, arm: Arm, settings: MeasurementSettings, device: torch.device) -> Sequence[Row]:
    rows: list[Row] = []
    for sigma in settings.levels:
        result = objective.losses(transformer, inputs(arm, settings, sigma, device), Weights())
        nan = torch.full((len(arm.batch.keys),), float("nan"))
        video = nan if result.video is None else result.video.cpu()
        audio = nan if result.audio is None else result.audio.cpu()
        total = torch.nan_to_num(video) * settings.video_weight + torch.nan_to_num(audio) * settings.audio_weight
        names = zip(arm.batch.keys, arm.batch.speakers, strict=True)
        values = zip(total.tolist(), video.tolist(), audio.tolist(), strict=True)
        rows += [
            Row(key=key, speaker=speaker, sigma=sigma, arm=arm.name, loss=loss, video=v, audio=a)
            for (key, speaker), (loss, v, a) in zip(names, values, strict=True)
        ]
    return rows
