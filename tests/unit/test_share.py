"""How processes share out a measurement: every item once, and equally many passes where they pass together."""

from __future__ import annotations

import pytest

from ltx_train.evaluation.share import ALL, Share


@pytest.mark.parametrize(("items", "parts"), [(0, 2), (1, 4), (5, 2), (6, 3), (7, 3)])
def test_every_item_counts_once_and_all_run_equally_many(items: int, parts: int) -> None:
    given = list(range(items))
    turns = [list(Share(part=part, parts=parts, most=lambda n: n).turns(given)) for part in range(parts)]
    assert len({len(own) for own in turns}) == 1
    assert sorted(item for own in turns for item, counts in own if counts) == given
    apart = [list(Share(part=part, parts=parts).turns(given)) for part in range(parts)]
    assert all(counts for own in apart for _, counts in own)


def test_missing_passes_are_those_of_the_busiest_process() -> None:
    assert Share(most=lambda count: max(count, 7)).missing(5) == 2
    assert ALL.missing(5) == 0
    assert list(ALL.turns("ab")) == [("a", True), ("b", True)]
