"""From an address to a sample: reads verified bytes out of WebDataset shards by offset.

Owns random access, digest checks and the choice of references. A byte that does not match the
index is an error that names the shard, never a silently different sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import DataError, Sample
from ltx_train.data.index import Index, Record
from ltx_train.data.order import Address

VIDEO, AUDIO, VOICE, REFERENCE = "video_latent", "audio_latent", "voice_latent", "reference_latent"
VIDEO_CONTEXT, AUDIO_CONTEXT = "video_context", "audio_context"
# 12.6 MB each on the 22B; a constant caption needs one, a set of a few dozen captions is read once.
_CONTEXTS_KEPT = 64


class Reader:
    """Samples of a prepared folder by key. `seed` keys which clip of a speaker serves as the reference."""

    def __init__(self, root: str | Path, index: Index, *, seed: int, references: bool) -> None:
        self._root, self._seed, self._references = Path(root), seed, references
        self.records: Mapping[str, Record] = {r.key: r for r in index.records}
        self._donors: dict[str, list[str]] = {}
        for record in sorted(index.records, key=lambda r: r.key):
            if record.voice:
                self._donors.setdefault(record.speaker, []).append(record.key)
        self._contexts: dict[str, dict[str, Tensor]] = {}

    def sample(self, address: Address) -> Sample:
        """The sample, with the reference of its own speaker if the mode uses one."""
        reference = self.reference_key(address) if self._references else None
        return self.with_reference(address, reference)

    def with_reference(self, address: Address, reference: str | None) -> Sample:
        """The sample with the voice of a given clip (its own key: the reference prepared for it)."""
        record = self.records[address.key]
        tensors = self.tensors(record)
        contexts = self._context(record.context)
        return Sample(
            key=record.key,
            speaker=record.speaker,
            draw=address.draw,
            fps=record.fps,
            video_latent=tensors.get(VIDEO),
            audio_latent=tensors.get(AUDIO),
            video_context=contexts[VIDEO_CONTEXT],
            audio_context=contexts[AUDIO_CONTEXT],
            reference_audio=None if reference is None else self.voice(reference, own=reference == record.key),
        )

    def reference_key(self, address: Address) -> str:
        """The clip whose voice is the reference: the prepared one, else a keyed choice among the speaker's others."""
        record = self.records[address.key]
        if record.own_reference:
            return record.key
        donors = [key for key in self._donors.get(record.speaker, []) if key != record.key]
        if not donors:
            raise DataError(
                f"{record.key}: speaker {record.speaker!r} has no other clip long enough for a reference window; "
                "add clips or a reference_audio column, or lower data.reference_s and prepare again"
            )
        return donors[rng.choice(len(donors), self._seed, "reference", record.key, address.draw)]

    def wrong_reference_key(self, address: Address) -> str | None:
        """A clip of another identity of the same split, by keyed choice; None when there is only one identity."""
        record = self.records[address.key]
        others = sorted(
            r.key for r in self.records.values()
            if r.speaker != record.speaker and r.split == record.split and (r.voice or r.own_reference)
        )  # fmt: skip
        if not others:
            return None
        return others[rng.choice(len(others), self._seed, "wrong-reference", record.key, address.draw)]

    def voice(self, key: str, *, own: bool) -> Tensor:
        """The reference latents (c, R, f) cut from clip `key`, or prepared for it."""
        tensors = self.tensors(self.records[key])
        return tensors[REFERENCE] if own or VOICE not in tensors else tensors[VOICE]

    def tensors(self, record: Record) -> dict[str, Tensor]:
        """All tensors of a sample; DataError when its bytes are not the indexed ones."""
        path = self._root / "shards" / record.shard
        try:
            with path.open("rb") as file:
                data = os.pread(file.fileno(), record.tensors.size, record.tensors.offset)
            if hashlib.sha256(data).hexdigest() != record.tensors.sha256:
                raise DataError(f"{path}: the bytes of {record.key} do not match the index: prepare again")
            return load_tensors(data)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot read {record.key} ({error}): prepare again") from error

    def _context(self, digest: str) -> dict[str, Tensor]:
        if digest not in self._contexts:
            if len(self._contexts) >= _CONTEXTS_KEPT:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[digest] = self._read_context(digest)
        return self._contexts[digest]

    def _read_context(self, digest: str) -> dict[str, Tensor]:
        path = self._root / "contexts" / f"{digest}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot read a text context ({error}): prepare again") from error
