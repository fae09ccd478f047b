"""Leaks: how well captions or recording conditions predict the identity without a reference.

An adapter may learn identity from these instead of the reference. Captions leak it when they contain names. Recording
conditions leak it when each person has a separate microphone or room. The measure is the accuracy of a
nearest-neighbour classifier over the index: the share of clips whose nearest other clip has the same identity. Windows
of one recording are not neighbours of each other. The classifier uses words and levels alone and misses other leaks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ltx_train import rng
from ltx_train.data.findings import Finding
from ltx_train.data.index import Index
from ltx_train.data.record import Record
from ltx_train.evaluation.statistics import Interval, by_identity

# Most clips that are compared with each other; all clips of people who are drawn at random.
_MOST_CLIPS = 2000
# What the room and the devices leave in a clip.
_CONDITIONS = ("lufs", "peak_db", "snr_db", "band_hz", "detail_db", "dark")
_TIE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """right: share of clips whose nearest clip is of the same person. chance: that of clips drawn at random.
    excess: the difference, with its interval over people."""

    source: str
    right: float
    chance: float
    excess: Interval
    advice: str

    @property
    def text(self) -> str:
        return (
            f"{self.source} tell the person in {100 * self.right:.0f} % of clips, {100 * self.chance:.0f} % by chance: "
            f"{100 * self.excess.mean:+.0f} ± {100 * self.excess.half:.0f} points over {self.excess.identities} people"
        )

    def finding(self) -> Finding | None:
        """A warning where the interval excludes chance."""
        return Finding(False, f"{self.text}; {self.advice}") if self.excess.mean > self.excess.half else None


def of_index(index: Index) -> list[Leak]:
    """Empty with fewer than two people who have two recordings."""
    records = _compared(index.records)
    if not records:
        return []
    measured: list[tuple[str, Callable[[Sequence[Record]], Tensor], str]] = [
        ("captions", _by_words, "leave out of captions what only one person has, such as names"),
        (
            "loudness, noise, bandwidth and sharpness", _by_conditions,
            "data.loudness evens out levels, and data.voice_variants vary the references",
        ),
    ]  # fmt: skip
    found = [_leak(source, records, nearness(records), advice) for source, nearness, advice in measured]
    return [leak for leak in found if leak is not None]


def _compared(records: Sequence[Record]) -> list[Record]:
    people = groupby(sorted(records, key=lambda r: (r.speaker, r.key)), key=lambda r: r.speaker)
    clips = {speaker: list(group) for speaker, group in people}
    chosen: list[Record] = []
    for speaker in sorted(clips, key=lambda name: float(rng.uniform(0, "leaks", name))):
        if chosen and len(chosen) + len(clips[speaker]) > _MOST_CLIPS:
            break
        chosen += clips[speaker][:_MOST_CLIPS]
    return chosen


def _leak(source: str, records: Sequence[Record], near: Tensor, advice: str) -> Leak | None:
    """near: (clips, clips), larger for clips that are more alike."""
    speaker, recording = (_numbered([getattr(r, field) for r in records]) for field in ("speaker", "recording"))
    other = recording[:, None] != recording[None]
    same = (speaker[:, None] == speaker[None]) & other
    near = near.masked_fill(~other, -torch.inf)
    nearest = other & (near >= near.max(dim=1, keepdim=True).values - _TIE)
    usable = same.any(1) & (other & ~same).any(1)
    right = (same & nearest).sum(1) / nearest.sum(1).clamp(min=1)
    chance = same.sum(1) / other.sum(1).clamp(min=1)
    excess: dict[str, list[float]] = {}
    for number in usable.nonzero().flatten().tolist():
        excess.setdefault(records[number].speaker, []).append(float(right[number] - chance[number]))
    if len(excess) < 2:
        return None
    return Leak(
        source=source, right=float(right[usable].mean()), chance=float(chance[usable].mean()),
        excess=by_identity(excess), advice=advice,
    )  # fmt: skip


def _by_words(records: Sequence[Record]) -> Tensor:
    """Cosines of captions as bags of words, each word weighted by the logarithm of its rarity."""
    words = [set(re.findall(r"\w+", record.caption.lower())) for record in records]
    used = Counter(word for bag in words for word in bag)
    places = {word: place for place, word in enumerate(sorted(word for word, count in used.items() if count > 1))}
    bags = torch.zeros(len(records), max(1, len(places)))
    for row, bag in enumerate(words):
        bags[row, [places[word] for word in bag if word in places]] = 1.0
    bags *= (len(records) / bags.sum(0).clamp(min=1)).log()
    bags = torch.nn.functional.normalize(bags, dim=1)
    return bags @ bags.T


def _by_conditions(records: Sequence[Record]) -> Tensor:
    """Negative distances of the measured numbers, each in units of its spread. A number that a clip lacks counts as the
    mean."""
    numbers = torch.tensor([[r.measured.get(name, torch.nan) for name in _CONDITIONS] for r in records])
    known = ~numbers.isnan()
    mean = numbers.nansum(0) / known.sum(0).clamp(min=1)
    centred = torch.where(known, numbers - mean, 0.0)
    spread = centred.square().mean(0).sqrt()
    scaled = torch.where(spread > 0, centred / spread.clamp(min=1e-12), 0.0)
    return -torch.cdist(scaled, scaled)


def _numbered(names: Sequence[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names])
