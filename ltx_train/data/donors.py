"""Who can lend a sample its reference: other clips of the speaker, or clips of other people.

Owns the choices and their keys. It reads the index alone, no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ltx_train import rng
from ltx_train.contracts import SPEAKER, Condition, DataError, ModalityName
from ltx_train.data.columns import Array, ByKey, Rows
from ltx_train.data.index import Index
from ltx_train.data.order import Address
from ltx_train.data.record import Record


class Donors:
    """Keyed choices among the samples of an index. by_key: its records."""

    def __init__(self, index: Index, by_key: ByKey, seed: int) -> None:
        self._seed, self._by_key = seed, by_key
        # In the order of their keys: a choice does not depend on how a folder was packed.
        rows = Rows(index.records.columns, np.array([by_key.row[key] for key in sorted(by_key)], np.int64))
        self._speakers, self._splits = rows.grouped("speaker"), rows.grouped("split")

    def split(self, record: Record) -> Rows:
        """The samples of the record's split."""
        return self._splits[record.split]

    def reference(self, address: Address, condition: Condition) -> str:
        """The key of the clip that provides the reference.

        This is the clip itself if it has a prepared reference, else a keyed choice among the speaker's other clips.
        DataError when no other clip fits.
        """
        record = self._by_key[address.key]
        if condition.source != SPEAKER or (condition.stream is ModalityName.audio and record.own_reference):
            return record.key
        clips, row = self._speakers[record.speaker], self._by_key.row[record.key]
        donors = clips.only(self._serving(clips, row, condition) & (clips.rows != row))
        if len(donors):
            return donors[rng.choice(len(donors), self._seed, "reference", record.key, address.draw)].key
        if condition.stream is ModalityName.audio:
            raise DataError(
                f"{record.key}: speaker {record.speaker!r} has no other clip long enough for a reference window; "
                "add clips or a reference_audio column, or lower data.reference_s and prepare again"
            )
        raise DataError(
            f"{record.key}: speaker {record.speaker!r} has no other clip of bucket {record.bucket} and its length as a "
            "reference; add clips, or prepare references and name their tensor in the condition's source"
        )

    def others(self, address: Address, count: int, conditions: Iterable[Condition]) -> list[str]:
        """Keys of up to `count` clips of other identities in the same split, by keyed choice.

        Each clip can provide the reference of every condition. The identities differ as long as there are enough of
        them.
        """
        row, clips = self._by_key.row[address.key], self.split(self._by_key[address.key])
        fits = ~clips.like("speaker", row)
        for condition in conditions:
            own = clips.numbers("own_reference") if condition.stream is ModalityName.audio else np.zeros(1, np.bool_)
            fits &= self._serving(clips, row, condition) | own
        fitting = clips.only(fits).grouped("speaker")
        stream = rng.generator(self._seed, "wrong-reference", address.key, address.draw)
        lists = [fitting[speaker] for speaker in sorted(fitting)]
        picked = [lists[i] for i in torch.randperm(len(lists), generator=stream).tolist()] if lists else []
        turns = [picked[i % len(picked)] for i in range(count)] if picked else []
        chosen = [rows[int(torch.randint(len(rows), (1,), generator=stream))].key for rows in turns]
        return list(dict.fromkeys(chosen))

    def other_caption(self, address: Address) -> str | None:
        """The key of a clip with another identity and another caption in the same split, by keyed choice; None if
        there is no such clip."""
        row, clips = self._by_key.row[address.key], self.split(self._by_key[address.key])
        others = clips.only(~clips.like("speaker", row) & ~clips.like("context", row))
        if not len(others):
            return None
        return others[rng.choice(len(others), self._seed, "wrong-caption", address.key, address.draw)].key

    def _serving(self, clips: Rows, row: int, condition: Condition) -> Array:
        """(n,) whether a clip can serve as the reference of the clip in that row of the columns."""
        if condition.stream is ModalityName.audio:
            return clips.numbers("voice") if condition.source == SPEAKER else np.ones(len(clips), np.bool_)
        return clips.shaped_like(row)


def unusable_share(clips: Rows, shards: Iterable[str]) -> tuple[Rows, float]:
    """The clips outside of these shards, and the share of those inside."""
    bad = clips.any_of("shard", shards)
    return clips.only(~bad), float(bad.mean())
