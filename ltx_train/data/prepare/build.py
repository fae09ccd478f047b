"""The preparation from end to end: encodes new clips and captions, packs shards and writes the index.

`items/` holds encoded samples and `contexts/` holds text contexts, both addressed by content. An interruption at any
moment loses at most the sample being encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.data import index
from ltx_train.data.index import Index, Record
from ltx_train.data.prepare import pack, splits, windows
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.items import FORMAT, digest, item, verified
from ltx_train.data.prepare.recipe import Recipe
from ltx_train.data.prepare.sources import Clip
from ltx_train.data.prepare.windows import Window
from ltx_train.model import sealed

Report = Callable[[int, int, str], None]
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a preparation: samples encoded now, those reused from earlier work, clips set aside with the reason."""

    encoded: int
    reused: int
    quarantined: Mapping[str, str]
    index: Index


def prepare(clips: list[Clip], recipe: Recipe, encoders: Encoders, root: Path, report: Report) -> Outcome:
    """Creates or completes a prepared folder. Writes the index last.

    DataError with every clip that cannot be prepared, unless such clips are set aside. What was encoded is kept.
    """
    items, contexts = root / "items", root / "contexts"
    for folder in (items, contexts):
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob("*.tmp-*"):
            partial.unlink()
    placed = splits.assign(clips, speakers=recipe.heldout_speakers, held=recipe.heldout_clips, seed=recipe.seed)
    bad: dict[str, str] = {}
    todo = _windows(clips, recipe, bad)
    _refuse(bad, recipe, len(clips))
    digests = {clip.key: _contexts(clip, recipe, encoders, contexts) for clip in clips}
    dropped = _context(recipe.dropped_caption, recipe, encoders, contexts)
    encoders.release_text()
    records: list[Record] = []
    encoded = 0
    for number, window in enumerate(todo, start=1):
        report(number, len(todo), window.key)
        try:
            record, new = _record(
                window, placed[window.clip.key], digests[window.clip.key], recipe, encoders, items=items
            )
            records.append(record)
            encoded += new
        except DataError as error:
            bad[window.key] = str(error)
    _refuse(bad, recipe, len(todo))
    if not records:
        raise DataError(
            f"none of the {len(clips)} clips could be prepared; the first reason: {next(iter(bad.values()))}"
        )
    shards, packed = pack.write_shards(
        records, lambda r: (items / f"{r.item}.safetensors").read_bytes(), root / "shards", recipe.samples_per_shard
    )
    result = Index(
        settings=recipe.settings(),
        encoders=encoders.fingerprints,
        shards=tuple(shards),
        records=tuple(packed),
        quarantined=bad,
        dropped_context=dropped,
    )
    index.save(result, root)
    pack.prune(root / "shards", shards)
    return Outcome(encoded, len(records) - encoded, bad, result)


def _windows(clips: list[Clip], recipe: Recipe, bad: dict[str, str]) -> list[Window]:
    """The samples of all clips, in the clips' order; clips without one go to `bad`."""
    found: list[Window] = []
    for clip in clips:
        try:
            found += windows.of_clip(clip, recipe.cutting)
        except DataError as error:
            bad[clip.key] = str(error)
    return found


def _refuse(bad: Mapping[str, str], recipe: Recipe, count: int) -> None:
    if not bad or recipe.skip_bad:
        return
    reasons = list(bad.values())
    mend = "(data.on_bad_clip=skip sets such clips aside)"
    if len(reasons) == 1:
        raise DataError(f"{reasons[0]} {mend}")
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    listed = "\n  ".join(reasons[:_SHOWN] + more)
    raise DataError(f"{len(reasons)} of {count} clips cannot be prepared {mend}:\n  {listed}")


def _record(
    window: Window, split: str, contexts: tuple[str, ...], recipe: Recipe, encoders: Encoders, *, items: Path
) -> tuple[Record, bool]:
    """A sample's record, and whether it was encoded now."""
    clip = window.clip
    key, source_sha, facts, new = item(window, recipe, encoders, items)
    if recipe.needs_audio and not facts["has_audio"]:
        raise DataError(f"{clip.medium} has no sound, but the mode generates or reads audio")
    if recipe.needs_audio and facts["rms_db"] < recipe.silence_db:
        raise DataError(f"{clip.medium} is silent ({facts['rms_db']:.0f} dB, data.silence_db={recipe.silence_db:g})")
    record = Record(
        key=window.key, split=split, speaker=clip.speaker, recording=clip.key, weight=clip.weight,
        caption=recipe.final_caption(clip.caption), context=contexts[0], variants=contexts[1:],
        source=clip.medium.name, source_sha256=source_sha, item=key, **facts,
    )  # fmt: skip
    return record, new


def _contexts(clip: Clip, recipe: Recipe, encoders: Encoders, contexts: Path) -> tuple[str, ...]:
    """Digests of the text contexts of a clip's captions, without duplicates; a constant caption leaves one."""
    captions = dict.fromkeys(recipe.final_caption(text) for text in (clip.caption, *clip.captions))
    return tuple(_context(text, recipe, encoders, contexts) for text in captions)


def _context(caption: str, recipe: Recipe, encoders: Encoders, contexts: Path) -> str:
    """Returns the digest of a caption's text context. Encodes the context if its file is absent or damaged."""
    fingerprints = {k: v for k, v in encoders.fingerprints.items() if k.startswith("text")}
    name = digest(FORMAT, caption, fingerprints, recipe.latent_dtype)
    path = contexts / f"{name}.safetensors"
    if verified(path) is None:
        durable.write(path, sealed.pack(encoders.caption(caption), {}))
    return name
