"""`ltx-train cut`: long recordings to clips and the table that `prepare` reads."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from ltx_train import durable
from ltx_train.assembly import resolve
from ltx_train.assembly.closing import close
from ltx_train.config import Config, counted_fps
from ltx_train.contracts import ConfigError, DataError, Exit
from ltx_train.data.footage import listening, pieces, subtitles, writer
from ltx_train.data.footage.pieces import Lengths, Span
from ltx_train.data.footage.subtitles import Subtitle
from ltx_train.data.prepare.media import probe
from ltx_train.data.prepare.tables import VIDEOS

_TABLE = "captions.csv"
_COLUMNS = ("video", "caption", "speaker")
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
        raise DataError(f"{config.cut.source} has no piece of {_lengths(config).shortest:g} s: lower cut.shortest_s")
    text = io.StringIO()
    writing = csv.writer(text)
    writing.writerow(_COLUMNS)
    writing.writerows(rows)
    durable.write(table, text.getvalue())
    silent = sum(not caption for _, caption, _ in rows)
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


def _cut(recording: Path, config: Config, out: Path) -> Iterator[tuple[str, str, str]]:
    """Writes the clips of a recording; their rows."""
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
        yield clip.name, subtitles.said_within(told, piece), config.cut.speaker or recording.stem


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
