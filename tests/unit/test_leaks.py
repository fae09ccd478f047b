"""What tells a person without a reference: planted leaks are found, and nothing is found where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ltx_train import rng
from ltx_train.data.columns import Rows
from ltx_train.data.index import Index
from ltx_train.data.record import Record
from ltx_train.evaluation import leaks

PEOPLE, CLIPS = 12, 5
WORDS = [
    "a",
    "person",
    "speaks",
    "slowly",
    "softly",
    "loudly",
    "in",
    "the",
    "kitchen",
    "garden",
    "office",
    "street",
    "about",
    "rain",
    "food",
    "music",
]


def record(person: int, clip: int, *, caption: str, recording: str = "", **measured: float) -> Record:
    return Record(
        key=f"{person}-{clip}", split="train", speaker=f"p{person}", recording=recording or f"{person}-{clip}",
        start=0.0, weight=1.0, caption=caption, bucket="64x64x33", fps=25.0, source_fps=25.0, averaged="", seconds=1.32,
        context="c", has_audio=True, voice=True, own_reference=False, rms_db=-20.0, source="x.mp4",
        source_sha256="0", item="i", measured=measured,
    )  # fmt: skip


def index_of(make: Callable[[int, int], Record]) -> Index:
    records = [make(person, clip) for person in range(PEOPLE) for clip in range(CLIPS)]
    return Index(settings={}, encoders={}, shards=(), records=Rows.of(records))


def some_words(person: int, clip: int) -> str:
    chosen = torch.randperm(len(WORDS), generator=rng.generator(0, "test", f"{person}-{clip}"))[:6]
    return " ".join(WORDS[i] for i in chosen.tolist())


def level(person: int, clip: int) -> float:
    return float(rng.normal((1,), 0, "test/level", f"{person}-{clip}"))


def honest(person: int, clip: int) -> Record:
    return record(person, clip, caption=some_words(person, clip), lufs=-20 + level(person, clip), band_hz=8000.0)


def test_nothing_is_found_where_nothing_tells() -> None:
    found = leaks.of_index(index_of(honest))
    assert [leak.finding() for leak in found] == [None, None]
    for leak in found:
        assert leak.chance == pytest.approx((CLIPS - 1) / (PEOPLE * CLIPS - 1))
        assert leak.right == pytest.approx(leak.chance, abs=0.1)


def test_a_name_in_captions_is_found() -> None:
    """The name alone: among other words that differ from clip to clip."""
    captions, conditions = leaks.of_index(
        index_of(lambda p, c: record(p, c, caption=f"{some_words(p, c)}, Name{p}", lufs=-20 + level(p, c)))
    )
    assert captions.right > 0.9
    finding = captions.finding()
    assert finding is not None
    assert not finding.error
    assert "captions tell the person in" in finding.text
    assert conditions.finding() is None


def test_a_microphone_of_everybodys_own_is_found() -> None:
    captions, conditions = leaks.of_index(
        index_of(lambda p, c: record(p, c, caption=some_words(p, c), lufs=-20 + 2 * p + level(p, c) / 10))
    )
    assert captions.finding() is None
    assert conditions.right > 0.9
    assert conditions.finding() is not None


def test_windows_of_one_recording_are_no_neighbours() -> None:
    """Each person has two recordings that differ as much as anybody's; windows of one recording are alike."""
    found = leaks.of_index(
        index_of(
            lambda p, c: record(p, c, caption="x", recording=f"{p}-{c % 2}", lufs=level(p, c % 2) + level(p, c) / 99)
        )
    )
    assert [leak.finding() for leak in found] == [None, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda p, c: record(0, p * CLIPS + c, caption="x"),
        lambda p, c: record(p, c, caption="x", recording=f"{p}"),
    ],
    ids=["one person", "one recording each"],
)
def test_nothing_can_be_known(make: Callable[[int, int], Record]) -> None:
    assert leaks.of_index(index_of(make)) == []
    assert leaks.of_index(Index(settings={}, encoders={}, shards=(), records=Rows.of([]))) == []


def test_missing_numbers_and_one_caption_tell_nothing() -> None:
    captions, conditions = leaks.of_index(index_of(lambda p, c: record(p, c, caption="one for all")))
    for leak in (captions, conditions):
        assert leak.right == pytest.approx(leak.chance)
        assert leak.finding() is None


def test_many_clips_are_those_of_some_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_MOST_CLIPS", 20)
    captions, _ = leaks.of_index(index_of(honest))
    assert captions.excess.identities == 4
