"""Reads the list of clips of a data set: a folder with CAPTIONS.json, or a CSV, JSON or JSONL table.

Owns the column names and the keys of samples. It opens no media.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx_train.contracts import DataError
from ltx_train.rng import key_seed

_COLUMNS = (
    "video", "caption", "speaker", "reference_audio", "reference_video", "mask", "audio_mask", "split",
)  # fmt: skip
_CAPTION_COLUMN = re.compile(r"caption_[2-9]")
_FILES = ("reference_audio", "reference_video", "mask")
_ALIASES = {"file": "video", "media_path": "video", "identity": "speaker"}
_SPLITS = ("", "train", "heldout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One row of a data set: media, captions, speaker and split. With an empty `split`, `prepare` chooses the split.

    captions: captions after the first. files: paths by column: reference_audio, reference_video (a control video) and
    mask (a video, white where the clip is kept clean). audio_mask: spans in seconds that are kept clean.
    """

    key: str
    video: Path
    caption: str
    speaker: str
    split: str
    captions: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    audio_mask: str = ""


def read_source(source: str | Path) -> list[Clip]:
    """Reads all clips, sorted by key. DataError names a missing file, an unknown column, a duplicate or empty entry."""
    path = Path(source).expanduser()
    table = path / "CAPTIONS.json" if path.is_dir() else path
    if not table.is_file():
        raise DataError(f"no data set at {source}: give a folder with CAPTIONS.json, or a .csv, .json or .jsonl file")
    rows = _rows(table)
    if not rows:
        raise DataError(f"{table} lists no clips")
    clips = [_clip(row, number, table) for number, row in enumerate(rows, start=1)]
    duplicates = [key for key, count in Counter(c.key for c in clips).items() if count > 1]
    if duplicates:
        raise DataError(f"{table} lists a clip more than once: {', '.join(sorted(duplicates)[:5])}")
    missing = [str(c.video) for c in clips if not c.video.is_file()]
    missing += [str(path) for c in clips for path in c.files.values() if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} files named in {table} do not exist: {', '.join(missing[:5])}")
    return sorted(clips, key=lambda clip: clip.key)


def _rows(table: Path) -> list[Any]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if table.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        content = json.loads(text)
        rows = content["captions"] if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise ValueError('a list of clips, or {"captions": [...]} is expected')
        return rows
    except (ValueError, KeyError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as {table.suffix[1:]} ({error})") from error


def _clip(row: Any, number: int, table: Path) -> Clip:
    where = f"{table}, entry {number}"
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: an object with the columns video and caption is expected, not {row!r}")
    if None in row:
        raise DataError(f"{where}: more cells than columns: put quotes around a caption that contains a comma")
    captions = _captions(row)
    row = {**row, "caption": captions[0]} if captions else row
    cells = {name: value for name, value in row.items() if not _CAPTION_COLUMN.fullmatch(name)}
    values = {_column(name, where): str(value).strip() for name, value in cells.items() if value not in (None, "")}
    if "video" not in values or "caption" not in values:
        raise DataError(f"{where}: needs the columns video (or file) and caption, but has {', '.join(sorted(row))}")
    if values.get("split", "") not in _SPLITS:
        raise DataError(f"{where}: split is {values['split']!r}, but must be train or heldout")
    strange = [values[name] for name in ("video", "speaker") if not values.get(name, "").isprintable()]
    if strange:
        raise DataError(f"{where}: {strange[0]!r} has control characters: rename it")
    return Clip(
        key=sample_key(values["video"]),
        video=table.parent / values["video"],
        caption=values["caption"],
        speaker=values.get("speaker", table.parent.resolve().name),
        split=values.get("split", ""),
        captions=tuple(captions[1:]),
        files={name: table.parent / values[name] for name in _FILES if name in values},
        audio_mask=values.get("audio_mask", ""),
    )


def _captions(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row: a list (JSON), or the columns caption, caption_2, caption_3 ..."""
    first = row.get("caption")
    captions = list(first) if isinstance(first, list) else [first]
    captions += [row[name] for name in sorted(row) if _CAPTION_COLUMN.fullmatch(name)]
    return [str(text).strip() for text in captions if text not in (None, "")]


def _column(name: str, where: str) -> str:
    column = _ALIASES.get(name, name)
    if column in _COLUMNS:
        return column
    matches = difflib.get_close_matches(name, [*_COLUMNS, *_ALIASES], n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    raise DataError(f"{where}: unknown column {name!r}{hint} (known: {', '.join(_COLUMNS)})")


def sample_key(relative: str) -> str:
    """A tar-safe key. WebDataset cuts keys at the first dot, so dots and path separators become underscores."""
    return re.sub(r"[./\\\s]+", "_", str(Path(relative).with_suffix("")).strip("./"))


def split_by_identity(clips: Iterable[Clip], share: float, seed: int) -> dict[str, str]:
    """Maps each clip's key to train or heldout. Whole identities are held out, so no speaker is in both splits.

    The explicit split of a row applies to all clips of its speaker. DataError when a speaker's rows disagree.
    """
    clips = list(clips)
    fixed: dict[str, str] = {}
    for clip in clips:
        if clip.split and fixed.setdefault(clip.speaker, clip.split) != clip.split:
            raise DataError(f"speaker {clip.speaker!r} is listed in both splits: an identity belongs to one")
    free = sorted({c.speaker for c in clips} - fixed.keys(), key=lambda name: _rank(name, seed))
    count = round(share * len(free))
    if share > 0 and len(free) > 1:
        count = min(max(1, count), len(free) - 1)
    held = set(free[: count if len(free) > 1 else 0]) | {s for s, split in fixed.items() if split == "heldout"}
    return {c.key: "heldout" if c.speaker in held else "train" for c in clips}


def _rank(name: str, seed: int) -> int:
    # The rank depends on the name and the seed alone: adding a speaker does not reorder the others.
    return key_seed(seed, "split", name)
