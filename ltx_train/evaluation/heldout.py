"""Held-out loss on a fixed sigma grid with fixed noise, and the reference gap on the same noise.

Owns which comparisons are made. Every number compared with another one is computed under the same
noise: correct and wrong reference, adapter on and off, this checkpoint and the last.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from ltx_train.contracts import Batch, Mode
from ltx_train.data.collate import collate
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader
from ltx_train.diffusion import conditions, objective
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.evaluation.statistics import Interval, by_identity
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer

CORRECT, WRONG, BASE = "correct", "wrong", "base"


@dataclass(frozen=True, slots=True)
class Settings:
    """sigmas: the grid. wrong_references: draws per sample for the gap. max_samples 0 takes all."""

    mode: Mode
    sigmas: tuple[float, ...]
    seed: int
    batch_size: int
    max_samples: int
    wrong_references: int
    video_weight: float
    audio_weight: float


@dataclass(frozen=True, slots=True)
class Row:
    """Losses of one sample at one noise level under one arm; nan for a modality that is not generated."""

    key: str
    speaker: str
    sigma: float
    arm: str
    loss: float
    video: float
    audio: float


def measure(
    transformer: Transformer, root: str, index: Index, settings: Settings, device: torch.device, *, with_base: bool,
    share: tuple[int, int] = (0, 1),
) -> list[Row]:  # fmt: skip
    """The rows of the held-out split; of every n-th batch from the k-th on where share is (k, n).

    Leaves training mode and torch's random state as they were.
    """
    with _evaluation_mode(transformer):
        return list(_rows(transformer, Reader(root, index, seed=settings.seed, references=settings.mode.uses_reference),
                          index, settings, device, with_base, share))  # fmt: skip


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The documented names (docs/architecture.md) for metrics.jsonl and W&B.

    Rows are put in one order first, so that several ranks' shares give the very numbers of one process.
    """
    rows = sorted(rows, key=lambda r: (r.key, r.sigma, r.arm, r.loss))
    values = {"val/loss": _mean(rows, CORRECT, "loss")}
    values |= {f"val/loss_{m}": _mean(rows, CORRECT, m) for m in ("video", "audio")}
    for sigma in sorted({row.sigma for row in rows}):
        at = [row for row in rows if row.sigma == sigma]
        values[f"val/loss_sigma/{sigma:g}"] = _mean(at, CORRECT, "loss")
        if any(row.arm == WRONG for row in at):
            values[f"val/reference_gap_sigma/{sigma:g}"] = paired(at, CORRECT, WRONG).mean
    if any(row.arm == WRONG for row in rows):
        gap = paired(rows, CORRECT, WRONG)
        values |= {"val/reference_gap": gap.mean, "val/reference_gap_ci95": gap.half}
    if any(row.arm == BASE for row in rows):
        values["val/adapter_gain"] = paired(rows, CORRECT, BASE).mean
    return {name: value for name, value in values.items() if not math.isnan(value)}


def paired(rows: Iterable[Row], arm: str, other: str, column: str = "loss") -> Interval:
    """Interval of arm - other over identities; pairs share sample, noise level and noise."""
    first: dict[tuple[str, float], float] = {}
    second: dict[tuple[str, float], list[float]] = {}
    speakers: dict[str, str] = {}
    for row in rows:
        speakers[row.key] = row.speaker
        if row.arm == arm:
            first[row.key, row.sigma] = getattr(row, column)
        elif row.arm == other:
            second.setdefault((row.key, row.sigma), []).append(getattr(row, column))
    differences: dict[str, list[float]] = {}
    for place, values in second.items():
        difference = first[place] - sum(values) / len(values)
        differences.setdefault(speakers[place[0]], []).append(difference)
    return by_identity(differences)


def _rows(
    transformer: Transformer, reader: Reader, index: Index, settings: Settings, device: torch.device, with_base: bool,
    share: tuple[int, int],
) -> Iterator[Row]:  # fmt: skip
    records = sorted(index.split(HELDOUT), key=lambda r: (r.bucket, r.key))
    records = records[: settings.max_samples] if settings.max_samples else records
    batches: list[list[Address]] = []
    for bucket in sorted({r.bucket for r in records}):
        keys = [Address(r.key, 0) for r in records if r.bucket == bucket]
        batches += [keys[start : start + settings.batch_size] for start in range(0, len(keys), settings.batch_size)]
    for addresses in batches[share[0] :: share[1]]:
        for arm, batch in _arms(reader, addresses, settings, with_base):
            off = adapter.disabled(transformer) if arm == BASE else nullcontext()
            with off:
                yield from _losses(transformer, batch, arm, settings, device)


def _arms(reader: Reader, addresses: list[Address], settings: Settings, with_base: bool) -> Iterator[tuple[str, Batch]]:
    correct = collate([reader.sample(a) for a in addresses])
    yield CORRECT, correct
    if with_base:
        yield BASE, correct
    for number in range(settings.wrong_references if settings.mode.uses_reference else 0):
        wrong = [(a, reader.wrong_reference_key(replace(a, draw=number))) for a in addresses]
        if all(key is not None for _, key in wrong):
            yield WRONG, collate([reader.with_reference(a, key) for a, key in wrong])


def _losses(
    transformer: Transformer, batch: Batch, arm: str, settings: Settings, device: torch.device
) -> Iterator[Row]:
    for sigma in settings.sigmas:
        # The distribution is irrelevant here: the level is given; the noise is keyed by sample alone.
        draws = conditions.draw(batch, settings.mode, SigmaDistribution(), settings.seed, sigma=sigma)
        inputs = conditions.to_device(conditions.assemble(batch, settings.mode, draws), device)
        result = objective.losses(transformer, inputs, settings.video_weight, settings.audio_weight)
        nan = torch.full((len(batch.keys),), float("nan"))
        video = nan if result.video is None else result.video.cpu()
        audio = nan if result.audio is None else result.audio.cpu()
        total = torch.nan_to_num(video) * settings.video_weight + torch.nan_to_num(audio) * settings.audio_weight
        columns = zip(batch.keys, batch.speakers, total.tolist(), video.tolist(), audio.tolist(), strict=True)
        yield from (Row(key, speaker, sigma, arm, t, v, a) for key, speaker, t, v, a in columns)


@contextmanager
def _evaluation_mode(transformer: Transformer) -> Generator[None]:
    training = transformer.training
    state = torch.get_rng_state()
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train(training)
        torch.set_rng_state(state)


def _mean(rows: Iterable[Row], arm: str, column: str) -> float:
    values: Mapping[str, list[float]] = {}
    kept = [(row.speaker, getattr(row, column)) for row in rows if row.arm == arm]
    values = {s: [v for speaker, v in kept if speaker == s] for s in {speaker for speaker, _ in kept}}
    return by_identity(values).mean
