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

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import SPEAKER, Condition, DataError, ModalityName, Mode, Role, Sample
from ltx_train.data.donors import Donors, unusable_share
from ltx_train.data.files import SHARDS
from ltx_train.data.index import Index
from ltx_train.data.order import Address
from ltx_train.data.record import Member, Record
from ltx_train.data.united import files_of

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
        self._unit, self.records = index.unit, index.records.by_key()
        self._donors = Donors(index, self.records, seed)
        self._contexts: dict[str, dict[str, Tensor]] = {}

    def sample(self, address: Address) -> Sample:
        """The sample with its correct references and the caption of this draw."""
        return self._assemble(address, None, self._captioned(address))

    def with_references_of(self, address: Address, other: str) -> Sample:
        """The sample with the references of clip `other`: its voice, its video, or the tensors prepared for it."""
        return self._assemble(address, other, self._captioned(address))

    def with_caption_of(self, address: Address, other: str) -> Sample:
        """The sample with the first caption of clip `other`."""
        return self._assemble(address, None, (self.records[other], 0))

    def caption(self, address: Address) -> int:
        """Which of the record's text contexts this draw uses: the dropped caption's, or a keyed choice among the
        clip's captions."""
        record, request = self.records[address.key], self._request
        where = (record.key, address.draw)
        if request.caption_dropout and float(rng.uniform(self._seed, "caption/drop", *where)) < request.caption_dropout:
            return len(record.contexts) - 1
        return rng.choice(1 + len(record.variants), self._seed, "caption", *where) if request.variants else 0

    def reference_key(self, address: Address, condition: Condition) -> str:
        """As of `Donors.reference`."""
        return self._donors.reference(address, condition)

    def others(self, address: Address, count: int) -> list[str]:
        """As of `Donors.others`, for every requested reference."""
        return self._donors.others(address, count, self._request.references.values())

    def other_caption(self, address: Address) -> str | None:
        """As of `Donors.other_caption`."""
        return self._donors.other_caption(address)

    def _captioned(self, address: Address) -> tuple[Record, int]:
        return self.records[address.key], self.caption(address)

    def _assemble(self, address: Address, donor: str | None, text: tuple[Record, int]) -> Sample:
        """text: the record whose text context it gets, and the number of that context."""
        record = self.records[address.key]
        tensors, contexts = self.tensors(record), self.context(*text)
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
        return self._read(record, record.tensors, record.key)

    def context(self, record: Record, number: int = 0) -> dict[str, Tensor]:
        """One of the text contexts of a sample: `Record.contexts`. DataError as of `tensors`."""
        digest = record.contexts[number].sha256
        if digest not in self._contexts:
            context = self.read_context(record, number)
            if len(self._contexts) >= _CONTEXTS_KEPT:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[digest] = context
        return self._contexts[digest]

    def read_context(self, record: Record, number: int) -> dict[str, Tensor]:
        """As `context`, from the sample's own shard: other shards may hold an undamaged copy."""
        return self._read(record, record.contexts[number], f"a text context of {record.key}")

    def _read(self, record: Record, member: Member, what: str) -> dict[str, Tensor]:
        """The tensors of a member of a sample's shard."""
        name = f"{SHARDS}/{record.shard}"
        try:
            data = self._member(name, member)
            if data is None and self.files.forget(name):
                data = self._member(name, member)
            if data is None:
                raise DataError(f"{self.files.place(name)}: the bytes of {what} do not match the index: prepare again")
            return load_tensors(data)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.files.place(name)}: cannot read {what} ({error}): prepare again") from error

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
        record = self.records[address.key]
        usable, _ = unusable_share(self._donors.split(record), self.files.unusable())
        alike = usable.only(usable.shaped_like(self.records.row[address.key]))
        if not len(alike):
            return None
        chosen = rng.choice(len(alike), self._seed, f"stand-in/{attempt}", record.key, address.draw)
        return Address(alike[chosen].key, address.draw)

    def bad_share(self, address: Address) -> float:
        """Share of the samples of an address's split that are in unusable shards."""
        return unusable_share(self._donors.split(self.records[address.key]), self.files.unusable())[1]

    def shards(self, address: Address) -> list[str]:
        """Names of the shards that a sample and its references are read from, in the files of the folder."""
        keys = [address.key]
        with suppress(DataError):  # reading the sample names what is wrong with it
            keys += [self.reference_key(address, condition) for condition in self._request.references.values()]
        return list(dict.fromkeys(f"{SHARDS}/{self.records[key].shard}" for key in keys))


def _bytes(path: Path, member: Member) -> bytes | None:
    """The bytes of a member; None when they do not match the index."""
    with path.open("rb") as file:
        data = os.pread(file.fileno(), member.size, member.offset)
    return data if hashlib.sha256(data).hexdigest() == member.sha256 else None
