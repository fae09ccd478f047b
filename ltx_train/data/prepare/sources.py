"""The clips of a data set: rows of its table as checked objects.

Owns the column names and the keys of samples. It opens no media. All faults of a table come in one report.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx_train.contracts import DataError
from ltx_train.data.prepare.pictures import Box
from ltx_train.data.prepare.tables import Table, read_table

_FILES = ("audio", "reference_audio", "reference_video", "mask")
_COLUMNS = (
    "video", "caption", "speaker", *_FILES, "audio_mask", "split", "start", "end", "face", "weight", "reviewed",
    "findings", "transcript",
)  # fmt: skip
_CAPTION_COLUMN = re.compile(r"caption_[2-9]")
# The second line: columns of other trainers' tables.
_ALIASES = {
    "file": "video", "identity": "speaker", "person": "speaker", "text": "caption", "prompt": "caption",
    "media_path": "video", "file_name": "video", "ref_media_path": "reference_video", "video_mask": "mask",
}  # fmt: skip
_SPLITS = ("", "train", "heldout")
# The speaker of rows that name none.
UNNAMED = "unnamed"
# In the column `reviewed`: nobody has read a model's caption.
UNREVIEWED = "no"
_SHOWN = 20
_TIME = re.compile(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One row of a data set: media, captions, speaker and split. With an empty `split`, `prepare` chooses the split.

    video: None in a set of sounds alone. captions: captions after the first. files: paths by column: audio (the sound,
    when it is not the video's own), reference_audio, reference_video (a control video) and mask (a video, white where
    the clip is kept clean). audio_mask: spans in seconds that are kept clean. start, end: seconds of the file that are
    the clip. face: where the face is. weight: how often an epoch uses the clip. reviewed: whether somebody has read the
    caption.
    """

    key: str
    video: Path | None
    caption: str
    speaker: str
    split: str
    captions: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    audio_mask: str = ""
    start: float = 0.0
    end: float | None = None
    face: Box | None = None
    weight: float = 1.0
    reviewed: bool = True

    @property
    def medium(self) -> Path:
        """The file that decides how long the clip is."""
        return self.video or self.files["audio"]


def read_source(source: str | Path, caption: str | None = None) -> list[Clip]:
    """Reads all clips, sorted by key. DataError lists every missing file, unknown column, duplicate or empty entry.

    caption: of all clips; rows need none of their own then.
    """
    table = read_table(source)
    faults = _unknown_columns(table)
    clips: list[Clip] = []
    base = _base(table)
    for number, row in enumerate(table.rows, start=1):
        try:
            clips.append(_clip(row, table, base, caption))
        except (DataError, ValueError) as error:
            faults.append(f"entry {number}: {error}")
    faults += _duplicates(clips) + _missing(clips)
    if faults:
        raise DataError(_report(table.path, faults))
    return sorted(clips, key=lambda clip: clip.key)


def _report(path: Path, faults: list[str]) -> str:
    faults = list(dict.fromkeys(faults))
    if len(faults) == 1:
        return f"{path}: {faults[0]}"
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return f"{path} has {len(faults)} faults:\n  " + "\n  ".join(faults[:_SHOWN] + more)


def _duplicates(clips: list[Clip]) -> list[str]:
    seen: dict[str, Clip] = {}
    repeated = [clip for clip in clips if seen.setdefault(clip.key, clip) is not clip]
    return [
        f"{clip.medium} is listed more than once (as {clip.key}): put further captions into the columns caption_2, "
        "caption_3, ..., and parts of one file into rows with start and end"
        for clip in repeated
    ]


def _missing(clips: list[Clip]) -> list[str]:
    named = [path for clip in clips for path in (clip.video, *clip.files.values()) if path is not None]
    missing = list(dict.fromkeys(str(path) for path in named if not path.is_file()))
    return [f"{len(missing)} files do not exist: {', '.join(missing[:_SHOWN])}"] if missing else []


def _clip(row: Any, table: Table, base: Path, caption: str | None) -> Clip:
    if not isinstance(row, Mapping):
        raise DataError(f"an object with the columns video and caption is expected, not {row!r}")
    if None in row:
        raise DataError("more cells than columns: put quotes around a caption that contains a comma")
    texts = captions(row) or ([] if caption is None else [caption])
    values = {_column(name): str(value).strip() for name, value in row.items() if value not in (None, "")}
    medium = values.get("video") or values.get("audio")
    if medium is None or not texts:
        raise DataError(f"needs the columns video (or audio) and caption, but has {', '.join(sorted(row))}")
    if values.get("split", "") not in _SPLITS:
        raise DataError(f"split is {values['split']!r}, but must be train or heldout")
    strange = [v for v in (medium, values.get("speaker", "")) if not v.isprintable()]
    if strange:
        raise DataError(f"{strange[0]!r} has control characters: rename it")
    start, end = _seconds(values, "start"), _seconds(values, "end")
    if end is not None and end <= (start or 0.0):
        raise DataError(f"end={values['end']} is not behind start={values.get('start', '0')}")
    return Clip(
        key=sample_key(_relative(medium, table, base)) + ("" if start is None else f"_{start:g}s".replace(".", "_")),
        video=table.folder / values["video"] if "video" in values else None,
        caption=texts[0],
        speaker=values.get("speaker", UNNAMED),
        split=values.get("split", ""),
        captions=tuple(texts[1:]),
        files={name: table.folder / values[name] for name in _FILES if name in values},
        audio_mask=values.get("audio_mask", ""),
        start=start or 0.0,
        end=end,
        face=Box.parse(values["face"]) if "face" in values else None,
        weight=_weight(values.get("weight", "1")),
        reviewed=values.get("reviewed", "") != UNREVIEWED,
    )


def captions(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row: a list (JSON), or the columns caption, caption_2, caption_3 ..."""
    first = next((row[name] for name in row if _column(name) == "caption"), None)
    texts = list(first) if isinstance(first, list) else [first]
    texts += [row[name] for name in sorted(row) if _CAPTION_COLUMN.fullmatch(name)]
    return [str(text).strip() for text in texts if text not in (None, "")]


def cell(row: Mapping[str, Any], column: str) -> str:
    """A cell by its column's name or one of the column's other names; empty without one."""
    return next((str(row[name] or "").strip() for name in row if name and _column(name) == column), "")


def column_name(row: Mapping[str, Any], column: str) -> str:
    """How the row's table names a column."""
    return next((name for name in row if name and _column(name) == column), column)


def span(row: Mapping[str, Any]) -> tuple[float, float | None]:
    """The start and the end of a row's clip in its file, in seconds."""
    values = {name: text for name in ("start", "end") if (text := cell(row, name))}
    return _seconds(values, "start") or 0.0, _seconds(values, "end")


def _column(name: str) -> str:
    return _ALIASES.get(name.strip(), name.strip())


def _unknown_columns(table: Table) -> list[str]:
    names = dict.fromkeys(name for row in table.rows if isinstance(row, Mapping) for name in row if name is not None)
    known = [*_COLUMNS, *_ALIASES]
    faults: list[str] = []
    for name in names:
        if _column(name) not in _COLUMNS and not _CAPTION_COLUMN.fullmatch(name.strip()):
            matches = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else ""
            faults.append(f"unknown column {name!r}{hint} (known: {', '.join(_COLUMNS)})")
    return faults


def _seconds(values: Mapping[str, str], name: str) -> float | None:
    """Seconds, or hours:minutes:seconds."""
    text = values.get(name)
    if text is None:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise DataError(f"{name}={text!r} is no time: give seconds, or 1:02:03.5")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight <= 1000:
        raise DataError(f"weight={text!r}: give how often an epoch uses the clip, as 2 or 0.5")
    return weight


def _base(table: Table) -> Path:
    """What absolute names are relative to in keys, so that keys do not depend on where the footage lies."""
    rows = [row for row in table.rows if isinstance(row, Mapping)]
    named = [str(row[name]) for row in rows for name in row if name and _column(name) in ("video", "audio")]
    absolute = [str(Path(text).parent) for text in named if Path(text).is_absolute()]
    return Path(os.path.commonpath(absolute)) if absolute else table.folder


def _relative(medium: str, table: Table, base: Path) -> str:
    path = Path(medium)
    if not path.is_absolute():
        return medium
    inside = path.is_relative_to(table.folder.resolve())
    return str(path.relative_to(table.folder.resolve() if inside else base))


def sample_key(relative: str) -> str:
    """A tar-safe key. WebDataset cuts keys at the first dot, so dots and path separators become underscores."""
    return re.sub(r"[./\\\s]+", "_", str(Path(relative).with_suffix("")).strip("./"))
