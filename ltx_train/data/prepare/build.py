"""The preparation from end to end: encodes new clips and captions, packs shards and writes the index.

Owns the work folder. `items/` holds encoded clips and `contexts/` holds text contexts, both addressed by
content. The content of a clip covers its source bytes, settings and encoders. An interruption at any
moment loses at most the clip being encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.data import index
from ltx_train.data.index import Index, Record
from ltx_train.data.prepare import pack
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.media import read_clip
from ltx_train.data.prepare.sources import Clip, split_by_identity
from ltx_train.data.reader import AUDIO, REFERENCE, VOICE
from ltx_train.diffusion.grid import Bucket
from ltx_train.model import sealed

# Of items and contexts. 2: sealed files, whose damage is found. 3: resized pixels without a cast, surround by channels.
FORMAT = 3
Report = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of a preparation: what latents depend on besides media and encoders, and how to split and pack."""

    buckets: tuple[Bucket, ...]
    fps: float
    reference_s: float
    latent_dtype: str
    caption: str | None
    trigger: str | None
    heldout_speakers: float
    seed: int
    samples_per_shard: int
    needs_audio: bool
    silence_db: float
    skip_bad: bool
    reference_scale: int = 1
    reference_stride: int = 1
    drops_captions: bool = False
    keep_trigger: bool = True

    def settings(self) -> dict[str, Any]:
        """The settings that make prepared data stale when they change."""
        # Settings that earlier releases lacked appear only when used: otherwise all older folders would be stale.
        newer = {"reference_scale": self.reference_scale} if self.reference_scale != 1 else {}
        newer |= {"reference_stride": self.reference_stride} if self.reference_stride != 1 else {}
        newer |= {"dropped_caption": self.dropped_caption} if self.drops_captions else {}
        return newer | {
            "buckets": [str(bucket) for bucket in self.buckets],
            "fps": self.fps,
            "reference_s": self.reference_s,
            "latent_dtype": self.latent_dtype,
            "caption": self.caption,
            "trigger": self.trigger,
            "heldout_speakers": self.heldout_speakers,
        }

    @property
    def control_grid(self) -> tuple[int, int]:
        """How many times smaller control videos are, and every how many frames one is taken."""
        return self.reference_scale, self.reference_stride

    @property
    def dropped_caption(self) -> str:
        """The text that replaces a dropped caption: the trigger alone, or an empty string."""
        return self.trigger if self.trigger and self.keep_trigger else ""

    def final_caption(self, caption: str) -> str:
        """The constant caption or else the clip's, with the trigger in front unless the caption contains it already."""
        caption = self.caption if self.caption is not None else caption
        return f"{self.trigger} {caption}" if self.trigger and self.trigger not in caption else caption


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a preparation: clips encoded now, clips reused from earlier work, clips set aside with the reason."""

    encoded: int
    reused: int
    quarantined: Mapping[str, str]
    index: Index


def prepare(clips: list[Clip], recipe: Recipe, encoders: Encoders, root: Path, report: Report) -> Outcome:
    """Creates or completes a prepared folder. Writes the index last."""
    items, contexts = root / "items", root / "contexts"
    for folder in (items, contexts):
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob("*.tmp-*"):
            partial.unlink()
    splits = split_by_identity(clips, recipe.heldout_speakers, recipe.seed)
    digests = {clip.key: _contexts(clip, recipe, encoders, contexts) for clip in clips}
    dropped = _context(recipe.dropped_caption, recipe, encoders, contexts)
    encoders.release_text()
    records: list[Record] = []
    bad: dict[str, str] = {}
    encoded = 0
    for number, clip in enumerate(clips, start=1):
        report(number, len(clips), clip.key)
        try:
            record, new = _item(clip, splits[clip.key], recipe, encoders, items)
            records.append(replace(record, context=digests[clip.key][0], variants=digests[clip.key][1:]))
            encoded += new
        except DataError as error:
            if not recipe.skip_bad:
                raise DataError(f"{error} (data.on_bad_clip=skip sets such clips aside)") from error
            bad[clip.key] = str(error)
    if not records:
        raise DataError(
            f"none of the {len(clips)} clips could be prepared; the first reason: {next(iter(bad.values()))}"
        )
    shards, placed = pack.write_shards(
        records, lambda r: (items / f"{r.item}.safetensors").read_bytes(), root / "shards", recipe.samples_per_shard
    )
    result = Index(
        settings=recipe.settings(),
        encoders=encoders.fingerprints,
        shards=tuple(shards),
        records=tuple(placed),
        quarantined=bad,
        dropped_context=dropped,
    )
    index.save(result, root)
    pack.prune(root / "shards", shards)
    return Outcome(encoded, len(records) - encoded, bad, result)


def _item(clip: Clip, split: str, recipe: Recipe, encoders: Encoders, items: Path) -> tuple[Record, bool]:
    """Returns a clip's record and whether the clip was encoded now. An item of the same content is reused."""
    source_sha = _file_sha256(clip.video)
    key = _item_key(clip, source_sha, recipe, encoders)
    path = items / f"{key}.safetensors"
    facts = _facts(path)
    new = facts is None
    if facts is None:
        durable.write(path, _encoded(clip, recipe, encoders))
        facts = _facts(path)
        assert facts is not None, f"{path} is damaged right after it was written"
    if recipe.needs_audio and not facts["has_audio"]:
        raise DataError(f"{clip.video} has no sound, but the mode generates or reads audio")
    if recipe.needs_audio and facts["rms_db"] < recipe.silence_db:
        raise DataError(f"{clip.video} is silent ({facts['rms_db']:.0f} dB, data.silence_db={recipe.silence_db:g})")
    record = Record(
        key=clip.key, split=split, speaker=clip.speaker, caption=recipe.final_caption(clip.caption), context="",
        fps=recipe.fps, source=clip.video.name, source_sha256=source_sha, item=key, **facts,
    )  # fmt: skip
    return record, new


def _facts(path: Path) -> dict[str, Any] | None:
    """What the record of an item holds of it; None when the item is absent or damaged, and has to be encoded."""
    tensors = _verified(path)
    return None if tensors is None else json.loads(tensors[1]["facts"])


def _verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Content of a sealed file, None when it is absent or damaged."""
    try:
        return sealed.unpack(path.read_bytes())
    except (FileNotFoundError, DataError):
        return None


def _encoded(clip: Clip, recipe: Recipe, encoders: Encoders) -> bytes:
    """The bytes of a clip's item: its tensors, with the facts about them as metadata."""
    media = read_clip(clip.video, list(recipe.buckets), recipe.fps)
    encoded = encoders.clip(media, clip.files.get("reference_audio"), recipe.reference_s, recipe.fps)
    encoded.tensors.update(encoders.beside(media.bucket, clip, recipe.fps, recipe.control_grid))
    facts = {
        "bucket": str(media.bucket),
        "seconds": media.bucket.frames / recipe.fps,
        "source_fps": round(media.source_fps, 3),
        "averaged": media.averaged,
        "has_audio": AUDIO in encoded.tensors,
        "voice": VOICE in encoded.tensors,
        "own_reference": REFERENCE in encoded.tensors,
        "rms_db": round(encoded.rms_db, 2),
    }
    return sealed.pack(encoded.tensors, {"facts": json.dumps(facts, sort_keys=True)})


def _contexts(clip: Clip, recipe: Recipe, encoders: Encoders, contexts: Path) -> tuple[str, ...]:
    """Digests of the text contexts of a clip's captions, without duplicates; a constant caption leaves one."""
    captions = dict.fromkeys(recipe.final_caption(text) for text in (clip.caption, *clip.captions))
    return tuple(_context(text, recipe, encoders, contexts) for text in captions)


def _context(caption: str, recipe: Recipe, encoders: Encoders, contexts: Path) -> str:
    """Returns the digest of a caption's text context. Encodes the context if its file is absent or damaged."""
    fingerprints = {k: v for k, v in encoders.fingerprints.items() if k.startswith("text")}
    digest = _digest(FORMAT, caption, fingerprints, recipe.latent_dtype)
    path = contexts / f"{digest}.safetensors"
    if _verified(path) is None:
        durable.write(path, sealed.pack(encoders.caption(caption), {}))
    return digest


def _item_key(clip: Clip, source_sha: str, recipe: Recipe, encoders: Encoders) -> str:
    settings = {k: recipe.settings()[k] for k in ("buckets", "fps", "reference_s", "latent_dtype")}
    vaes = {k: v for k, v in encoders.fingerprints.items() if k.endswith("VAE")}
    files = {name: _file_sha256(path) for name, path in clip.files.items()}
    newer = {name: digest for name, digest in files.items() if name != "reference_audio"}
    extras = [newer, clip.audio_mask, recipe.reference_scale] if newer or clip.audio_mask else []
    extras += [recipe.reference_stride] if recipe.reference_stride != 1 else []
    return _digest(FORMAT, source_sha, files.get("reference_audio"), settings, vaes, *extras)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
