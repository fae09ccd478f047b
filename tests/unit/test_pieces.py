"""Where recordings are cut: inside scenes, in pauses, at lengths that can be trained."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from ltx_train.contracts import DataError
from ltx_train.data.footage import subtitles
from ltx_train.data.footage.pieces import Lengths, Span, cut

WHOLE = [Span(0.0, 30.0)]


def test_sentences_stay_together_as_long_as_they_fit() -> None:
    speech = [Span(1.0, 3.0), Span(3.4, 5.0), Span(6.0, 9.0), Span(12.0, 13.0)]
    assert cut(WHOLE, speech, Lengths(1.0, 5.0)) == [Span(0.75, 5.25), Span(5.75, 9.25), Span(11.75, 13.25)]
    assert cut(WHOLE, speech, Lengths(1.0, 12.5)) == [Span(0.75, 13.25)]


def test_a_short_sentence_takes_of_its_pauses_what_it_needs() -> None:
    assert cut(WHOLE, [Span(10.0, 10.6)], Lengths(2.0, 5.0)) == [Span(9.3, 11.3)]
    assert cut(WHOLE, [Span(0.2, 0.8)], Lengths(2.0, 5.0)) == [Span(0.0, 2.0)]
    assert cut([Span(0.0, 1.5)], [Span(0.2, 0.8)], Lengths(2.0, 5.0)) == []


def test_no_piece_goes_across_a_cut() -> None:
    scenes = [Span(0.0, 4.0), Span(4.0, 30.0)]
    assert cut(scenes, [Span(1.0, 6.5)], Lengths(1.0, 8.0)) == [Span(0.75, 4.0), Span(4.0, 6.75)]


@pytest.mark.parametrize("speech", [None, []])
def test_without_speech_scenes_are_divided_evenly(speech: list[Span] | None) -> None:
    assert cut([Span(0.0, 12.0), Span(12.0, 13.0)], speech, Lengths(2.0, 5.0)) == [
        Span(0.0, 4.0), Span(4.0, 8.0), Span(8.0, 12.0),
    ]  # fmt: skip


def test_any_recording_gives_ordered_pieces_of_good_length_inside_scenes() -> None:
    for seed in range(300):
        stream = random.Random(seed)
        edges = sorted(stream.uniform(0, 60) for _ in range(stream.randint(0, 6)))
        scenes = [Span(a, b) for a, b in itertools.pairwise([0.0, *edges, 60.0])]
        marks = sorted(stream.uniform(0, 60) for _ in range(2 * stream.randint(0, 20)))
        speech = [Span(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True)]
        lengths = Lengths(stream.uniform(0.5, 3), stream.uniform(3, 10))
        pieces = cut(scenes, speech, lengths)
        assert all(lengths.shortest - 1e-9 <= p.seconds <= lengths.longest + 1e-9 for p in pieces), seed
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(pieces)), seed
        assert all(any(s.start - 1e-9 <= p.start and p.end <= s.end + 1e-9 for s in scenes) for p in pieces), seed


def test_subtitles(tmp_path: Path) -> None:
    path = tmp_path / "a.srt"
    path.write_text(
        "1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>Hello</i>\r\nyou\r\n\r\n"
        "2\r\n01:00:03.5 --> 01:00:04,0\r\n{\\an8}Zoë\r\n",
        encoding="utf-8-sig",
    )
    found = subtitles.read(path)
    assert [(s.span, s.text) for s in found] == [
        (Span(1.0, 2.5), "Hello you"), (Span(3603.5, 3604.0), "Zoë"),
    ]  # fmt: skip
    assert subtitles.said_within(found, Span(1.6, 4.0)) == "Hello you"
    assert subtitles.said_within(found, Span(1.9, 4.0)) == ""
    path.write_text("nothing")
    with pytest.raises(DataError, match="holds no subtitles"):
        subtitles.read(path)
    path.write_bytes(b"\xff\xfe\x93")
    with pytest.raises(DataError, match="is not UTF-8"):
        subtitles.read(path)
