"""Rows of a data set in any of its layouts: a CSV, TSV, JSON or JSONL table, or a folder with a text beside each clip.

Owns the file formats. It knows no columns and opens no media.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_train import durable
from ltx_train.contracts import DataError

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac")
# Names of a folder's table, the first of them that exists is taken.
_NAMES = tuple(
    f"{name}{ending}"
    for name in ("CAPTIONS", "captions", "dataset", "metadata")
    for ending in (".json", ".jsonl", ".csv", ".tsv")
)
_DELIMITERS = ",;\t"
_ENDINGS = (".csv", ".tsv", ".json", ".jsonl")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Table:
    """path: the table, or the folder of texts, that messages name. folder: what file names are relative to. rows: cells
    by column as they were written; anything where a row is no row."""

    path: Path
    folder: Path
    rows: list[Any]


def read_table(source: str | Path) -> Table:
    """The rows of a data set. DataError when there is none, or when it cannot be read."""
    path = Path(source).expanduser()
    if path.is_dir():
        named = next((path / name for name in _NAMES if (path / name).is_file()), None)
        return _texts(path) if named is None else Table(named, path, _rows(named))
    if not path.is_file():
        raise DataError(f"no data set at {source}: give a folder of clips, or a .csv, .tsv, .json or .jsonl table")
    if path.suffix.lower() not in _ENDINGS:
        raise DataError(f"{path} is no table of clips: give its folder, or a .csv, .tsv, .json or .jsonl table")
    return Table(path, path.parent, _rows(path))


def open_for_captions(source: str | Path) -> Table:
    """The table of a data set, or a new one that lists the clips of a folder without any."""
    path = Path(source).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in _NAMES):
        media = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*VIDEOS, *STILLS) and p.is_file())
        if not media:
            raise DataError(_nothing_listed(path, media))
        rows: list[Any] = [
            {"video": str(p.relative_to(path)), "caption": _beside(p), "speaker": "", "reviewed": ""} for p in media
        ]
        return Table(path / "captions.csv", path, rows)
    table = read_table(path)
    strange = [row for row in table.rows if not isinstance(row, dict)]
    if strange:
        raise DataError(f"{table.path}: an object with the columns video and caption is expected, not {strange[0]!r}")
    return table


def save(table: Table) -> None:
    """Writes the rows back in the table's own format, atomically."""
    durable.write(table.path, _written(table))


def _written(table: Table) -> str:
    match table.path.suffix.lower():
        case ".csv" | ".tsv":
            text = io.StringIO()
            columns = list(dict.fromkeys(name for row in table.rows for name in row))
            delimiter = "\t" if table.path.suffix.lower() == ".tsv" else ","
            if table.path.is_file():
                delimiter = _delimiter(_text(table.path))
            writing = csv.DictWriter(text, columns, delimiter=delimiter, restval="")
            writing.writeheader()
            writing.writerows(table.rows)
            return text.getvalue()
        case ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.rows)
        case _:
            wrapped = table.path.is_file() and isinstance(json.loads(_text(table.path)), dict)
            content = {"captions": table.rows} if wrapped else table.rows
            return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _beside(path: Path) -> str:
    """The text beside a clip, empty without one."""
    return _text(path.with_suffix(".txt")).strip() if path.with_suffix(".txt").is_file() else ""


def _rows(table: Path) -> list[Any]:
    text = _text(table)
    try:
        match table.suffix.lower():
            case ".csv" | ".tsv":
                rows: list[Any] = list(csv.DictReader(text.splitlines(), delimiter=_delimiter(text)))
            case ".jsonl":
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            case _:
                content = json.loads(text)
                rows = content["captions"] if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise ValueError('a list of clips, or {"captions": [...]} is expected')
    except (ValueError, KeyError, csv.Error, RecursionError) as error:
        raise DataError(f"{table} cannot be read as {table.suffix[1:]} ({error})") from error
    if not rows:
        raise DataError(f"{table} lists no clips")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 (in Excel: CSV UTF-8), or convert it, as "
            f"`iconv -f cp1252 -t utf-8 {path.name}` does for files of Windows programs"
        ) from error


def _delimiter(text: str) -> str:
    """The one of `,`, `;` and tab that the first line has most of."""
    header = text.partition("\n")[0]
    return max(_DELIMITERS, key=header.count)


def _texts(folder: Path) -> Table:
    """A folder of clips with `clip.txt` beside `clip.mp4`."""
    media = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (*VIDEOS, *STILLS) and p.is_file())
    captioned = [p for p in media if p.with_suffix(".txt").is_file()]
    if not captioned:
        raise DataError(_nothing_listed(folder, media))
    bare = [str(p.relative_to(folder)) for p in media if p not in captioned]
    if bare:
        more = ", ..." if len(bare) > _SHOWN else ""
        raise DataError(
            f"{folder}: {len(bare)} of {len(media)} clips have no text beside them ({', '.join(bare[:_SHOWN])}{more}): "
            "write one for each, or list the clips in a table"
        )
    rows: list[Any] = [
        {"video": str(path.relative_to(folder)), "caption": _text(path.with_suffix(".txt")).strip()} for path in media
    ]
    return Table(folder, folder, rows)


def _nothing_listed(folder: Path, media: list[Path]) -> str:
    """What was found in a folder without captions, and the table to start from."""
    if not media:
        found = sum(1 for path in folder.rglob("*") if path.suffix.lower() in SOUNDS)
        sounds = f"; {found} sound files can be listed in a table with the column audio" if found else ""
        return f"{folder} holds no clips and no table of clips{sounds}"
    lines = [f"  {path.relative_to(folder)},what is seen and heard,anna" for path in media[:_SHOWN]]
    lines += ["  ..."] if len(media) > _SHOWN else []
    return (
        f"{folder} holds {len(media)} clips without captions. Write {folder / 'captions.csv'}:\n"
        "  video,caption,speaker\n"
        + "\n".join(lines)
        + "\nor a text beside each clip (clip.txt beside clip.mp4); `ltx-train caption` asks a model"
    )
