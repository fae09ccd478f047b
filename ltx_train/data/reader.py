"""Reads the sample of an address: verified bytes from WebDataset shards, by offset.

Owns random access, digest checks and the choice of references and captions. Bytes that do not match
the index raise an error that names the shard; the reader never returns a corrupt sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import SPEAKER, Condition, DataError, ModalityName, Mode, Role, Sample
from ltx_train.data.files import CONTEXTS, SHARDS
from ltx_train.data.index import Index, Member, Record
from ltx_train.data.order import Address
from ltx_train.data.united import files_of
from ltx_train.model import sealed

VIDEO, AUDIO, VOICE, REFERENCE = "video_latent", "audio_latent", "voice_latent", "reference_latent"
VIDEO_CONTEXT, AUDIO_CONTEXT = "video_context", "audio_context"
CONTROL, VIDEO_MASK, AUDIO_MASK = "reference_video_latent", "video_mask", "audio_mask"
FACE_MASK = "face_mask"
# A text context of the 22B takes 12.6 MB. Up to 64 captions are read once; a constant caption needs one context.
_CONTEXTS_KEPT = 64


def variant_of(name: str, variant: str) -> str:
    """The name of a voice's variant in the shards."""
    return f"{name}.{variant}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    """What the reader reads of a clip besides its latents and its first caption.

    references: reference conditions by name. masks: names of mask tensors; a clip without one of them is an error.
    caption_dropout: share of draws whose caption is dropped. variants: whether draws use further captions too.
    modalities: those whose latents are read. Clips may lack the others. voice_variants: those that
    voice_variant_share of the draws choose from.
    """

    references: Mapping[str, Condition] = field(default_factory=dict[str, Condition])
    masks: frozenset[str] = frozenset()
    caption_dropout: float = 0.0
    variants: bool = False
    modalities: frozenset[ModalityName] = frozenset(ModalityName)
    voice_variants: tuple[str, ...] = ()
    voice_variant_share: float = 0.0

    @classmethod
    def of(cls, modes: Iterable[Mode], masks: Iterable[str] = (), caption_dropout: float = 0.0) -> ReadRequest:
        """The request for training in any of `modes`; `masks` adds mask tensors to those of the modes."""
        modes = list(modes)
        references = {c.name: c for mode in modes for c in mode.references}
        mask_names = frozenset([*masks, *(name for mode in modes for name in mode.masks)])
        used = frozenset(name for name in ModalityName if any(mode.role(name) is not Role.absent for mode in modes))
        return cls(
            references=references, masks=mask_names, caption_dropout=caption_dropout, variants=True, modalities=used
        )


class Reader:
    """Reads the samples of a prepared folder by key. `seed` keys the choices of references and captions."""

    def __init__(self, root: str | Path, index: Index, *, seed: int, request: ReadRequest | None = None) -> None:
        self._seed, self._request = seed, request or ReadRequest()
        self.files = files_of(Path(root), index)
        self._dropped, self._unit = index.dropped_context, index.unit
        self.records: Mapping[str, Record] = {r.key: r for r in index.records}
        self._by_speaker: dict[str, list[Record]] = {}
        self._by_split: dict[str, list[Record]] = {}
        for record in sorted(index.records, key=lambda r: r.key):
            self._by_speaker.setdefault(record.speaker, []).append(record)
            self._by_split.setdefault(record.split, []).append(record)
        self._contexts: dict[str, dict[str, Tensor]] = {}

    def sample(self, address: Address) -> Sample:
        """The sample with its correct references and the caption of this draw."""
        return self._assemble(address, None, self.caption(address))

    def with_references_of(self, address: Address, other: str) -> Sample:
        """The sample with the references of clip `other`: its voice, its video, or the tensors prepared for it."""
        return self._assemble(address, other, self.caption(address))

    def with_caption_of(self, address: Address, other: str) -> Sample:
        """The sample with the first caption of clip `other`."""
        return self._assemble(address, None, self.records[other].context)

    def caption(self, address: Address) -> str:
        """Digest of this draw's text context, for the dropped caption or a keyed choice among the clip's captions."""
        record, request = self.records[address.key], self._request
        where = (record.key, address.draw)
        if request.caption_dropout and float(rng.uniform(self._seed, "caption/drop", *where)) < request.caption_dropout:
            return self._dropped
        choices = (record.context, *record.variants) if request.variants else (record.context,)
        return choices[rng.choice(len(choices), self._seed, "caption", *where)]

    def reference_key(self, address: Address, condition: Condition) -> str:
        """The key of the clip that provides the reference.

        This is the clip itself if it has a prepared reference, else a keyed choice among the speaker's other clips.
        DataError when no other clip fits.
        """
        record = self.records[address.key]
        if condition.source != SPEAKER or (condition.stream is ModalityName.audio and record.own_reference):
            return record.key
        others = [r for r in self._by_speaker.get(record.speaker, []) if r.key != record.key]
        donors = [r.key for r in others if _can_serve(r, record, condition)]
        if donors:
            return donors[rng.choice(len(donors), self._seed, "reference", record.key, address.draw)]
        if condition.stream is ModalityName.audio:
            raise DataError(
                f"{record.key}: speaker {record.speaker!r} has no other clip long enough for a reference window; "
                "add clips or a reference_audio column, or lower data.reference_s and prepare again"
            )
        raise DataError(
            f"{record.key}: speaker {record.speaker!r} has no other clip of bucket {record.bucket} and its length as a "
            "reference; add clips, or prepare references and name their tensor in the condition's source"
        )

    def others(self, address: Address, count: int) -> list[str]:
        """Keys of up to `count` clips of other identities in the same split, by keyed choice.

        Each clip can provide every requested reference. The identities differ as long as there are enough of them.
        """
        record = self.records[address.key]
        fitting: dict[str, list[str]] = {}
        for other in self._by_split[record.split]:
            if other.speaker != record.speaker and all(
                _can_serve(other, record, c) or (c.stream is ModalityName.audio and other.own_reference)
                for c in self._request.references.values()
            ):
                fitting.setdefault(other.speaker, []).append(other.key)
        stream = rng.generator(self._seed, "wrong-reference", record.key, address.draw)
        lists = [fitting[speaker] for speaker in sorted(fitting)]
        picked = [lists[i] for i in torch.randperm(len(lists), generator=stream).tolist()] if lists else []
        turns = [picked[i % len(picked)] for i in range(count)] if picked else []
        chosen = [keys[int(torch.randint(len(keys), (1,), generator=stream))] for keys in turns]
        return list(dict.fromkeys(chosen))

    def other_caption(self, address: Address) -> str | None:
        """The key of a clip with another identity and another caption in the same split, by keyed choice; None if
        there is no such clip."""
        record = self.records[address.key]
        keys = [
            r.key for r in self._by_split[record.split] if r.speaker != record.speaker and r.context != record.context
        ]  # fmt: skip
        if not keys:
            return None
        return keys[rng.choice(len(keys), self._seed, "wrong-caption", record.key, address.draw)]

    def _assemble(self, address: Address, donor: str | None, context: str) -> Sample:
        record = self.records[address.key]
        tensors, contexts = self.tensors(record), self.context(context)
        missing = sorted(name for name in self._request.masks if name not in tensors)
        if missing:
            raise DataError(f"{record.key}: no {missing[0]!r} in the shards, but the mode or the loss reads it")
        references = {
            name: self._reference(donor or self.reference_key(address, condition), condition, self._variant(address))
            for name, condition in self._request.references.items()
        }
        return Sample(
            key=record.key,
            speaker=self._unit(record),
            draw=address.draw,
            fps=record.fps,
            video_latent=tensors.get(VIDEO) if ModalityName.video in self._request.modalities else None,
            audio_latent=tensors.get(AUDIO) if ModalityName.audio in self._request.modalities else None,
            video_context=contexts[VIDEO_CONTEXT],
            audio_context=contexts[AUDIO_CONTEXT],
            references=references,
            masks={name: tensors[name] for name in self._request.masks},
        )

    def _variant(self, address: Address) -> str | None:
        """The variant of the voice in this draw, for the correct and a wrong reference alike; None: as recorded."""
        request, where = self._request, (address.key, address.draw)
        if not request.voice_variants or not request.voice_variant_share:
            return None
        if float(rng.uniform(self._seed, "voice/varied", *where)) >= request.voice_variant_share:
            return None
        return request.voice_variants[rng.choice(len(request.voice_variants), self._seed, "voice/variant", *where)]

    def _reference(self, key: str, condition: Condition, variant: str | None) -> Tensor:
        """The latents of clip `key` that serve as the reference of `condition`."""
        tensors = self.tensors(self.records[key])
        names = (condition.source,)
        if condition.source == SPEAKER:
            voice = (REFERENCE, VOICE) if self.records[key].own_reference else (VOICE,)
            if variant is not None:
                voice = tuple(variant_of(name, variant) for name in voice)
            names = voice if condition.stream is ModalityName.audio else (VIDEO,)
        for name in names:
            if name in tensors:
                return tensors[name]
        raise DataError(f"{key}: no {names[0]!r} in the shards, but a reference of the mode reads it")

    def tensors(self, record: Record) -> dict[str, Tensor]:
        """All tensors of a sample. DataError when its bytes cannot be read or do not match the index."""
        name = f"{SHARDS}/{record.shard}"
        try:
            data = self._member(name, record.tensors)
            if data is None and self.files.forget(name):
                data = self._member(name, record.tensors)
            if data is None:
                raise DataError(
                    f"{self.files.place(name)}: the bytes of {record.key} do not match the index: prepare again"
                )
            return load_tensors(data)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.files.place(name)}: cannot read {record.key} ({error}): prepare again") from error

    def _member(self, name: str, member: Member) -> bytes | None:
        """The bytes of a member; None when they do not match the index."""
        try:
            return _bytes(self.files.path(name), member)
        except FileNotFoundError:
            # Another process has made room in the cache between the two calls.
            if not self.files.forget(name):
                raise
            return _bytes(self.files.path(name), member)

    def stand_in(self, address: Address, attempt: int) -> Address | None:
        """Another sample of the same split and shape for one whose shard is unusable, by keyed choice; None without."""
        record, unusable = self.records[address.key], self.files.unusable()
        usable = [
            r.key for r in self._by_split[record.split] if r.shape == record.shape and r.shard not in unusable
        ]  # fmt: skip
        if not usable:
            return None
        chosen = rng.choice(len(usable), self._seed, f"stand-in/{attempt}", record.key, address.draw)
        return Address(usable[chosen], address.draw)

    def bad_share(self, address: Address) -> float:
        """Share of the samples of an address's split that are in unusable shards."""
        unusable, split = self.files.unusable(), self._by_split[self.records[address.key].split]
        return sum(record.shard in unusable for record in split) / len(split)

    def shards(self, address: Address) -> list[str]:
        """Names of the shards that a sample and its references are read from, in the files of the folder."""
        keys = [address.key]
        with suppress(DataError):  # reading the sample names what is wrong with it
            keys += [self.reference_key(address, condition) for condition in self._request.references.values()]
        return list(dict.fromkeys(f"{SHARDS}/{self.records[key].shard}" for key in keys))

    def context(self, digest: str) -> dict[str, Tensor]:
        """A text context by its digest. DataError when it cannot be read or is damaged."""
        if digest not in self._contexts:
            if len(self._contexts) >= _CONTEXTS_KEPT:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[digest] = self._read_context(digest)
        return self._contexts[digest]

    def _read_context(self, digest: str) -> dict[str, Tensor]:
        name = f"{CONTEXTS}/{digest}.safetensors"
        try:
            try:
                return sealed.unpack(self.files.path(name).read_bytes())[0]
            except DataError:
                if not self.files.forget(name):
                    raise
                return sealed.unpack(self.files.path(name).read_bytes())[0]
        except (OSError, DataError) as error:
            raise DataError(f"{self.files.place(name)}: cannot read a text context ({error}): prepare again") from error


def _bytes(path: Path, member: Member) -> bytes | None:
    """The bytes of a member; None when they do not match the index."""
    with path.open("rb") as file:
        data = os.pread(file.fileno(), member.size, member.offset)
    return data if hashlib.sha256(data).hexdigest() == member.sha256 else None


def _can_serve(record: Record, target: Record, condition: Condition) -> bool:
    """Whether the clip of `record` can serve as the reference of the clip of `target`."""
    if condition.source != SPEAKER:
        return condition.stream is ModalityName.audio or record.shape == target.shape
    return record.voice if condition.stream is ModalityName.audio else record.shape == target.shape
