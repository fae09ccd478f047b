"""SubRip subtitles: texts with their times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ltx_train.contracts import DataError
from ltx_train.data.footage.pieces import Span

_TIMES = re.compile(r"(\d+):(\d\d):(\d\d)[,.](\d{1,3})\s*-->\s*(\d+):(\d\d):(\d\d)[,.](\d{1,3})")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True, slots=True)
class Subtitle:
    span: Span
    text: str


def read(path: Path) -> list[Subtitle]:
    """The subtitles of an .srt file, in order. DataError when it cannot be read or holds none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: convert it, as `iconv -f cp1252 -t utf-8 {path.name}`") from error
    found: list[Subtitle] = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        match = _TIMES.search(block)
        if match is not None:
            said = " ".join(_MARKUP.sub("", block[match.end() :]).split())
            found.append(Subtitle(Span(_seconds(match.groups()[:4]), _seconds(match.groups()[4:])), said))
    if not found:
        raise DataError(f"{path} holds no subtitles (as 00:00:01,000 --> 00:00:02,500)")
    return sorted(found, key=lambda subtitle: subtitle.span)


def said_within(subtitles: Sequence[Subtitle], piece: Span) -> str:
    """The text of the subtitles that lie in a piece by more than half."""
    return " ".join(
        subtitle.text
        for subtitle in subtitles
        if min(subtitle.span.end, piece.end) - max(subtitle.span.start, piece.start) > subtitle.span.seconds / 2
    )


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds = (int(part) for part in parts[:3])
    return 3600 * hours + 60 * minutes + seconds + int(parts[3].ljust(3, "0")) / 1000
