"""Where a recording is cut: pieces inside scenes, between sentences, of lengths that can be trained.

Pure: spans of seconds in, spans out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Seconds that a piece keeps before its first and behind its last word, where the pause has them.
_MARGIN_S = 0.25


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Seconds of a recording."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Lengths:
    """Seconds that a piece has at least and at most."""

    shortest: float
    longest: float


def cut(scenes: Sequence[Span], speech: Sequence[Span] | None, lengths: Lengths) -> list[Span]:
    """The pieces of a recording, in order. speech: None when nothing listens for it; scenes are divided evenly then,
    and so are those without a word. What is shorter than the shortest piece is left out."""
    pieces: list[Span] = []
    for scene in scenes:
        words = [span for span in (_within(word, scene) for word in speech or ()) if span is not None]
        found = _between_words(words, scene, lengths) if words else _evenly(scene, lengths)
        pieces += [piece for piece in found if piece.seconds >= lengths.shortest]
    return pieces


def _within(span: Span, scene: Span) -> Span | None:
    """The part of a span inside a scene."""
    start, end = max(span.start, scene.start), min(span.end, scene.end)
    return Span(start, end) if start < end else None


def _between_words(words: Sequence[Span], scene: Span, lengths: Lengths) -> list[Span]:
    """Sentences together as long as they fit; a piece ends in the pause behind its last word."""
    groups: list[list[Span]] = []
    for word in [part for span in words for part in _evenly(span, lengths)]:
        if groups and word.end - groups[-1][0].start <= lengths.longest:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [
        _with_margins(group, _before(groups, number, scene), _behind(groups, number, scene), lengths)
        for number, group in enumerate(groups)
    ]


def _before(groups: Sequence[Sequence[Span]], number: int, scene: Span) -> float:
    """The middle of the pause before a group of words, from which on its piece may start."""
    return scene.start if number == 0 else (groups[number - 1][-1].end + groups[number][0].start) / 2


def _behind(groups: Sequence[Sequence[Span]], number: int, scene: Span) -> float:
    return scene.end if number + 1 == len(groups) else (groups[number][-1].end + groups[number + 1][0].start) / 2


def _with_margins(group: Sequence[Span], earliest: float, latest: float, lengths: Lengths) -> Span:
    """The words with some of the pauses around them: more of them where the piece would be too short."""
    spoken = Span(group[0].start, group[-1].end)
    spare = max(0.0, lengths.longest - spoken.seconds)
    margin = min(max(_MARGIN_S, (lengths.shortest - spoken.seconds) / 2), spare / 2)
    start, end = max(earliest, spoken.start - margin), min(latest, spoken.end + margin)
    missing = lengths.shortest - (end - start)
    if missing > 0:  # one of the pauses was too short for its half
        end = min(latest, end + missing)
        start = max(earliest, min(start, end - lengths.shortest))
    return Span(start, end)


def _evenly(span: Span, lengths: Lengths) -> list[Span]:
    """A span as it is, or in equal parts that are not too long."""
    count = max(1, -(-span.seconds // lengths.longest))
    step = span.seconds / count
    return [Span(span.start + number * step, span.start + (number + 1) * step) for number in range(int(count))]
