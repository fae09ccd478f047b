"""The preparation from end to end: encodes new clips and captions, packs shards and writes the index.

`items/` holds encoded samples and `contexts/` holds text contexts, both addressed by content. Ranks share out files,
captions and samples; the first packs. An interruption at any moment loses at most the sample that a rank encodes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ltx_train import durable
from ltx_train.contracts import DataError, Exit
from ltx_train.data import index
from ltx_train.data.columns import Rows
from ltx_train.data.files import SHARDS
from ltx_train.data.index import Index
from ltx_train.data.prepare import items, pack, splits, windows
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.items import Decoded, Item
from ltx_train.data.prepare.recipe import Recipe
from ltx_train.data.prepare.sources import Clip
from ltx_train.data.prepare.windows import Window
from ltx_train.data.record import Record
from ltx_train.distributed.ranks import ALONE, AgreedError, Ranks
from ltx_train.model import sealed

Report = Callable[[int, int, str], None]
T = TypeVar("T")
# What was encoded before it is packed. Both folders may be removed from a finished one.
ITEMS, CONTEXTS = "items", "contexts"
_SHOWN = 20
# Samples that are decoded ahead of the encoders, each in a thread. One of 1280x704x153 takes 0.4 GB.
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a preparation: samples encoded now, those reused from earlier work, clips set aside with the reason."""

    encoded: int
    reused: int
    quarantined: Mapping[str, str]
    index: Index


def prepare(
    clips: list[Clip], recipe: Recipe, encoders: Encoders, root: Path, report: Report, *, ranks: Ranks = ALONE
) -> Outcome:
    """Creates or completes a prepared folder. The first rank writes the index, last of all. Collective.

    DataError with every clip that cannot be prepared, unless such clips are set aside. What was encoded is kept.
    """
    work, contexts = root / ITEMS, root / CONTEXTS
    ranks.lead(lambda: [str(_emptied_of_partials(folder)) for folder in (work, contexts)])
    placed = splits.assign(clips, speakers=recipe.heldout_speakers, held=recipe.heldout_clips, seed=recipe.seed)
    todo, bad = _windows(clips, recipe, ranks)
    _refuse(bad, recipe, len(clips), ranks)
    dropped = recipe.dropped_caption
    texts = sorted({dropped, *(text for clip in clips for text in _captions(clip, recipe))})
    digests = _contexts(texts, recipe, encoders, contexts, ranks=ranks)
    encoders.release_text()
    made, failed = _items(todo, recipe, encoders, work, report, ranks=ranks)
    bad |= failed
    _refuse(bad, recipe, len(todo), ranks)
    records = [
        _record(window, made[window.key], placed[window.clip.key], recipe, digests)
        for window in todo
        if window.key in made
    ]
    if not records:
        if not ranks.leads:
            raise AgreedError(Exit.DATA)
        raise DataError(
            f"none of the {len(clips)} clips could be prepared; the first reason: {next(iter(bad.values()))}"
        )
    result = ranks.lead(lambda: _packed(records, recipe, encoders, root, bad, dropped=digests[dropped]))
    encoded = sum(made[record.key].new for record in records)
    return Outcome(encoded, len(records) - encoded, bad, result)


def _emptied_of_partials(folder: Path) -> Path:
    """The folder, without what killed processes left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("*.tmp-*"):
        partial.unlink()
    return folder


def _packed(
    records: list[Record], recipe: Recipe, encoders: Encoders, root: Path, bad: Mapping[str, str], *,
    dropped: str,
) -> Index:  # fmt: skip
    """Shards and index of the records."""
    sources = pack.Sources(
        item=lambda record: (root / ITEMS / f"{record.item}.safetensors").read_bytes(),
        context=lambda digest: (root / CONTEXTS / f"{digest}.safetensors").read_bytes(),
        dropped=dropped,
    )
    shards, packed = pack.write_shards(records, sources, root / SHARDS, recipe.samples_per_shard)
    result = Index(
        settings=recipe.settings(), encoders=encoders.fingerprints, shards=tuple(shards), records=Rows.of(packed),
        quarantined=bad,
    )  # fmt: skip
    index.save(result, root)
    pack.prune(root / SHARDS, shards)
    return result


def _windows(clips: Sequence[Clip], recipe: Recipe, ranks: Ranks) -> tuple[list[Window], dict[str, str]]:
    """The samples of all clips, in the clips' order, and the clips without one with the reason. Each rank probes its
    share of the files."""
    found: dict[str, list[Window]] = {}
    bad: dict[str, str] = {}
    for clip in _share(clips, ranks):
        try:
            found[clip.key] = windows.of_clip(clip, recipe.cutting)
        except DataError as error:
            bad[clip.key] = str(error)
    for others, faults in ranks.gather((found, bad)):
        found |= others
        bad |= faults
    return [window for clip in clips for window in found.get(clip.key, [])], dict(sorted(bad.items()))


def _share(everything: Sequence[T], ranks: Ranks) -> Sequence[T]:
    """This rank's part: entries rank, rank + world, rank + 2 * world, ... Neighbouring clips have similar costs."""
    return everything[ranks.rank :: ranks.world]


def _refuse(bad: Mapping[str, str], recipe: Recipe, count: int, ranks: Ranks) -> None:
    if not bad or recipe.skip_bad:
        return
    if not ranks.leads:
        raise AgreedError(Exit.DATA)  # the first rank knows all faults and names them
    reasons = list(bad.values())
    mend = "(data.on_bad_clip=skip sets such clips aside)"
    if len(reasons) == 1:
        raise DataError(f"{reasons[0]} {mend}")
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    listed = "\n  ".join(reasons[:_SHOWN] + more)
    raise DataError(f"{len(reasons)} of {count} clips cannot be prepared {mend}:\n  {listed}")


def _items(
    todo: Sequence[Window], recipe: Recipe, encoders: Encoders, work: Path, report: Report, *, ranks: Ranks
) -> tuple[dict[str, Item], dict[str, str]]:
    """The items of all samples by key, and the samples without one with the reason."""
    made: dict[str, Item] = {}
    bad: dict[str, str] = {}
    own = _share(todo, ranks)
    for number, (window, reading) in enumerate(_read_ahead(own, recipe, encoders, work), start=1):
        report(number, len(own), window.key)
        try:
            found = reading.result()
            item = items.write(found, recipe, encoders, work) if isinstance(found, Decoded) else found
            _check_sound(window.clip, item, recipe)
            made[window.key] = item
        except DataError as error:
            bad[window.key] = str(error)
    for others, faults in ranks.gather((made, bad)):
        made |= others
        bad |= faults
    return made, dict(sorted(bad.items()))


def _read_ahead(
    own: Sequence[Window], recipe: Recipe, encoders: Encoders, work: Path
) -> Iterator[tuple[Window, Future[Item | Decoded]]]:
    """Reads samples in threads, in order, some ahead of the one that is encoded.

    A sample is submitted when an earlier one is taken: at most `_AHEAD` decoded ones wait in memory.
    """
    threads = max(1, min(_AHEAD, (os.cpu_count() or 1) // 2))
    waiting: deque[tuple[Window, Future[Item | Decoded]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for window in own:
            waiting.append((window, pool.submit(items.read, window, recipe, encoders.fingerprints, work)))
            if len(waiting) > threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_sound(clip: Clip, item: Item, recipe: Recipe) -> None:
    if recipe.needs_audio and not item.facts["has_audio"]:
        raise DataError(f"{clip.medium} has no sound, but the mode generates or reads audio")
    loudness = item.facts["rms_db"]
    if recipe.needs_audio and loudness < recipe.silence_db:
        raise DataError(f"{clip.medium} is silent ({loudness:.0f} dB, data.silence_db={recipe.silence_db:g})")


def _record(window: Window, item: Item, split: str, recipe: Recipe, digests: Mapping[str, str]) -> Record:
    clip = window.clip
    contexts = tuple(digests[text] for text in _captions(clip, recipe))
    return Record(
        key=window.key, split=split, speaker=clip.speaker, recording=clip.key, weight=clip.weight,
        caption=recipe.final_caption(clip.caption), context=contexts[0], variants=contexts[1:],
        source=clip.medium.name, source_sha256=item.source_sha256, item=item.key, **item.facts,
    )  # fmt: skip


def _captions(clip: Clip, recipe: Recipe) -> list[str]:
    """The captions of a clip as they are encoded, without duplicates; a constant caption leaves one."""
    return list(dict.fromkeys(recipe.final_caption(text) for text in (clip.caption, *clip.captions)))


def _contexts(
    texts: Sequence[str], recipe: Recipe, encoders: Encoders, folder: Path, *, ranks: Ranks
) -> dict[str, str]:
    """The digest of each caption's text context. Contexts whose files are absent or damaged are encoded."""
    fingerprints = {k: v for k, v in encoders.fingerprints.items() if k.startswith("text")}
    digests = {text: items.digest(items.FORMAT, text, fingerprints, recipe.latent_dtype) for text in texts}
    for text in _share(texts, ranks):
        path = folder / f"{digests[text]}.safetensors"
        if items.verified(path) is None:
            durable.write(path, sealed.pack(encoders.caption(text), {}))
    ranks.any(False)  # a barrier: the first rank must not index what another still writes
    return digests
