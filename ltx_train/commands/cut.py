"""`ltx-train cut`: long recordings to clips and the table that `prepare` reads."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from ltx_train import durable
from ltx_train.assembly import resolve
from ltx_train.assembly.closing import close
from ltx_train.config import Config, counted_fps
from ltx_train.contracts import ConfigError, DataError, Exit
from ltx_train.data.footage import listening, looking, pieces, subtitles, writer
from ltx_train.data.footage.pieces import Lengths, Span
from ltx_train.data.footage.subtitles import Subtitle
from ltx_train.data.prepare.media import probe
from ltx_train.data.prepare.tables import VIDEOS

_TABLE = "captions.csv"
_COLUMNS = ("video", "caption", "speaker", "face", "findings")
# Without buckets: what recipes ask for.
_LONGEST_S = 10.0


def run(config: Config) -> int:
    """Cuts every recording. The table comes last, so that an interrupted cut can be repeated."""
    assert config.cut.source is not None  # config.require has refused it
    recordings, out = _recordings(Path(config.cut.source)), Path(config.cut.out)
    table = out / _TABLE
    if table.exists() and not config.run.overwrite:
        raise ConfigError(f"{table} exists, maybe with captions: choose another cut.out, or set run.overwrite=true")
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for recording in recordings for row in _cut(recording, config, out)]
    if not rows:
        without = f", or empty cut.leave_out={config.cut.leave_out}" if config.cut.leave_out else ""
        shortest = _lengths(config).shortest
        raise DataError(f"{config.cut.source} has no piece of {shortest:g} s: lower cut.shortest_s{without}")
    text = io.StringIO()
    writing = csv.writer(text)
    writing.writerow(_COLUMNS)
    writing.writerows(astuple(row) for row in rows)
    durable.write(table, text.getvalue())
    silent = sum(not row.caption for row in rows)
    print(f"{len(rows)} clips of {len(recordings)} recordings in {out}")
    if silent:
        print(f"  {silent} clips have no caption yet: write them into {table}")
    close(table, f"ltx-train prepare experiment=... data.source={out} data.root=prepared")
    return Exit.DONE


def _recordings(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in VIDEOS)
        if not found:
            raise DataError(f"{source} holds no videos ({', '.join(VIDEOS)})")
        return found
    return [source]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row of the table."""

    video: str
    caption: str
    speaker: str
    face: str
    findings: str


def _cut(recording: Path, config: Config, out: Path) -> Iterator[_Row]:
    """Writes the clips of a recording. The rows of those that stay, and a line for each finding."""
    facts = probe(recording)
    if not facts.fps:
        raise DataError(f"{recording} has no pictures")
    scenes = listening.scenes(recording, facts.seconds) if config.cut.scenes else [Span(0.0, facts.seconds)]
    speech = listening.speech(recording) if config.cut.speech else None
    told = _subtitles(recording, config)
    found = pieces.cut(scenes, speech, _lengths(config))
    print(f"{recording.name}: {facts.seconds:.0f} s, {len(scenes)} scenes, {len(found)} clips", file=sys.stderr)
    for number, piece in enumerate(found):
        clip = out / f"{recording.stem}_{number:03d}.mp4"
        writer.write(recording, piece, clip)
        looks = looking.look(clip) if config.cut.look else None
        found = [] if looks is None else looking.remarks(looks)
        left_out = [remark for remark in found if remark.kind in config.cut.leave_out]
        for remark in found:
            gone = ": left out" if remark in left_out else ""
            print(f"  {clip.name} ({_minutes(piece.start)}): {remark.text}{gone}", file=sys.stderr)
        if left_out:
            clip.unlink()
            continue
        face = ",".join(f"{edge:.3f}" for edge in looks.face) if looks is not None and looks.face else ""
        kinds = ", ".join(remark.kind for remark in found)
        yield _Row(
            video=clip.name, caption=subtitles.said_within(told, piece),
            speaker=config.cut.speaker or recording.stem, face=face, findings=kinds,
        )  # fmt: skip


def _minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:04.1f}"


def _subtitles(recording: Path, config: Config) -> list[Subtitle]:
    """Those of cut.subtitles, or the .srt beside the recording."""
    path = recording.with_suffix(".srt") if config.cut.subtitles is None else Path(config.cut.subtitles)
    return subtitles.read(path) if config.cut.subtitles is not None or path.is_file() else []


def _lengths(config: Config) -> Lengths:
    """The longest is that of the longest bucket, when it is not given."""
    longest = config.cut.longest_s
    if longest is None:
        buckets = resolve.buckets(config)
        longest = max(b.frames for b in buckets) / counted_fps(config) if buckets else _LONGEST_S
    if longest < config.cut.shortest_s:
        raise ConfigError(f"cut.shortest_s={config.cut.shortest_s:g} is above the longest piece, {longest:.2f} s")
    return Lengths(config.cut.shortest_s, longest)
