"""The index of a prepared folder: its samples, the location of their bytes, and their sources.

Owns `index.json` and its schema version. It imports no torch, because reading an index must be instant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.diffusion.grid import audio_latents

SCHEMA = 4
_DIGEST = "sha256"
INDEX_NAME = "index.json"
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True, slots=True)
class Member:
    """The location of a member inside a shard: byte offset, size in bytes, and SHA-256 of the bytes."""

    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One sample.

    recording: the row that the sample is a part of, from `start` seconds of its file on. seconds: length of the target.
    weight: how often an epoch uses the sample. voice: whether the sample has a voice window, which other clips use as a
    reference. context, variants: digests of the text contexts of the first caption and of the further captions.
    source_fps: frames a second of the clip's file, on average. averaged: the layout of a sound whose channels were
    averaged, else empty. measured: what `data.prepare.measure` and `data.prepare.items` define, by name.
    """

    key: str
    split: str
    speaker: str
    recording: str
    start: float
    weight: float
    caption: str
    bucket: str
    fps: float
    source_fps: float
    averaged: str
    seconds: float
    context: str
    has_audio: bool
    voice: bool
    own_reference: bool
    rms_db: float
    source: str
    source_sha256: str
    item: str
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    variants: tuple[str, ...] = ()
    shard: str = ""
    tensors: Member = Member(0, 0, "")

    @property
    def shape(self) -> str:
        """What samples of one batch share: the bucket, and the length of the sound, which follows from the rate."""
        return f"{self.bucket}+{audio_latents(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    size: int
    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of a prepared folder.

    settings, encoders: what the latents depend on. The folder is stale when they differ from the run's.
    dropped_context: digest of the text context that replaces a dropped caption.
    """

    settings: Mapping[str, Any]
    encoders: Mapping[str, str]
    shards: tuple[Shard, ...]
    records: tuple[Record, ...]
    quarantined: Mapping[str, str] = field(default_factory=dict[str, str])
    dropped_context: str = ""

    def split(self, name: str) -> tuple[Record, ...]:
        return tuple(r for r in self.records if r.split == name)

    @cached_property
    def by_clip(self) -> bool:
        """Whether recordings of the same people are held out, not people."""
        return bool({r.speaker for r in self.split(HELDOUT)} & {r.speaker for r in self.split(TRAIN)})

    def unit(self, record: Record) -> str:
        """What counts once in intervals: the identity, or the recording where those are held out."""
        return record.recording if self.by_clip else record.speaker


def save(index: Index, root: Path) -> None:
    """Writes the index atomically. `prepare` writes it last, so a folder with an index is complete."""
    content = {"schema": SCHEMA, **asdict(index)}
    text = json.dumps({**content, _DIGEST: _digest(content)}, indent=1, sort_keys=True, ensure_ascii=False)
    durable.write(root / INDEX_NAME, text + "\n")


def load(root: str | Path) -> Index:
    """Reads the index of a prepared folder.

    DataError when the folder is not completely prepared, or when its index is damaged or from another release.
    """
    path = Path(root) / INDEX_NAME
    if not path.is_file():
        raise DataError(f"no prepared data at {root}: run `ltx-train prepare` with the same data settings first")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise DataError(f"{path} was written by another release: run `ltx-train prepare` again")
        if raw.pop(_DIGEST) != _digest(raw):
            raise ValueError("its content does not match its digest")
        del raw["schema"]
        raw["records"] = tuple(_record(r) for r in raw["records"])
        raw["shards"] = tuple(Shard(**s) for s in raw["shards"])
        return Index(**raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): run `ltx-train prepare` again") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record(raw: dict[str, Any]) -> Record:
    member = Member(**raw.pop("tensors"))
    # Names are printed to terminals, and a foreign folder's may hold escape sequences.
    strange = [raw[name] for name in ("key", "speaker", "recording", "shard", "source") if not raw[name].isprintable()]
    if strange or "/" in raw["shard"]:
        raise ValueError(f"the name {(strange or [raw['shard']])[0]!r}")
    variants = tuple(raw.pop("variants", ()))
    return Record(**raw, variants=variants, tensors=member)


def stale_reasons(index: Index, settings: Mapping[str, Any], encoders: Mapping[str, str]) -> list[str]:
    """Every difference between the settings and encoders of the latents and those of the run, as text."""
    pairs = [("data." + k, index.settings.get(k), v) for k, v in settings.items()]
    pairs += [(f"the {k}", index.encoders.get(k), v) for k, v in encoders.items()]
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]
