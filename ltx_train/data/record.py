"""One sample of a prepared folder, and where its bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ltx_train.diffusion.grid import audio_latents


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
    averaged, else empty. measured: what `data.prepare.measure` and `data.prepare.items` define, by name. tensors,
    contexts: where the shard has the latents, and the text contexts of `context`, of `variants` in their order, and of
    the dropped caption.
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
    contexts: tuple[Member, ...] = ()

    @property
    def shape(self) -> str:
        return shape(self.bucket, self.seconds)


def shape(bucket: str, seconds: float) -> str:
    """What samples of one batch share: the bucket, and the length of the sound, which follows from the rate."""
    return f"{bucket}+{audio_latents(seconds)}"
