"""Which clips are held out: whole identities, or clips of the same people."""

from __future__ import annotations

from collections.abc import Iterable

from ltx_train.contracts import DataError
from ltx_train.data.index import HELDOUT, TRAIN
from ltx_train.data.prepare.sources import Clip
from ltx_train.rng import key_seed


def assign(clips: Iterable[Clip], *, speakers: float, held: float, seed: int) -> dict[str, str]:
    """Maps each clip's key to train or heldout.

    speakers: share of identities that are held out with all their clips. held: number (from 1 on) or share of
    recordings that are held out instead, from the same people; 0: none. A row's own split wins for that row, and its
    identity is not drawn. Clips of one file are never separated.
    """
    clips = list(clips)
    marked: dict[str, str] = {}
    for clip in clips:
        if clip.split and marked.setdefault(str(clip.medium), clip.split) != clip.split:
            raise DataError(f"{clip.medium} is listed in both splits: parts of one recording belong to one")
    if held:
        drawn = _drawn({str(c.medium): c.key for c in clips if str(c.medium) not in marked}, held, seed)
        chosen = {c.key for c in clips if str(c.medium) in drawn}
    else:
        settled = {clip.speaker for clip in clips if clip.split}
        free = {clip.speaker: clip.speaker for clip in clips if clip.speaker not in settled}
        names = _drawn(free, speakers, seed)
        chosen = {c.key for c in clips if c.speaker in names}
    own = {TRAIN: TRAIN, HELDOUT: HELDOUT}
    return {c.key: own.get(marked.get(str(c.medium), ""), HELDOUT if c.key in chosen else TRAIN) for c in clips}


def _drawn(ranked_by: dict[str, str], amount: float, seed: int) -> set[str]:
    """A keyed choice: a name's rank depends on itself and the seed alone, so that adding one reorders no others.

    ranked_by: what each entry is ranked by. At least one is drawn and one is left; of a single one, none.
    """
    entries = sorted(ranked_by, key=lambda name: key_seed(seed, "split", ranked_by[name]))
    if amount <= 0 or len(entries) < 2:
        return set()
    count = round(amount) if amount >= 1 else round(amount * len(entries))
    return set(entries[: min(max(1, count), len(entries) - 1)])
