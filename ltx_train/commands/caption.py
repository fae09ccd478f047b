"""`ltx-train caption`: transcripts and captions by models, for the clips of a table or a folder that have none."""

from __future__ import annotations

import io
import os
import sys
import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.assembly import resolve
from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.config.schema.commands import CaptionConfig
from ltx_train.contracts import ConfigError, DataError, Exit
from ltx_train.data.footage import captioner
from ltx_train.data.footage.captioner import Endpoint
from ltx_train.data.footage.transcriber import RATE, Transcriber
from ltx_train.data.prepare import sources, tables
from ltx_train.data.prepare.media import Facts, Part, probe, read_pixels
from ltx_train.data.prepare.pictures import Crop, Framing
from ltx_train.data.prepare.sound import read_audio
from ltx_train.data.prepare.sources import UNREVIEWED
from ltx_train.data.prepare.tables import Table
from ltx_train.diffusion.grid import Bucket
from ltx_train.jobs.folder_lock import FolderLock
from ltx_train.model import mel
from ltx_train.sampling.media import jpeg


def run(config: Config) -> int:
    """Fills the transcripts and captions that are missing. The table is written after each, so that nothing is lost."""
    assert config.data.source is not None  # config.require has refused it
    endpoint = None if config.caption.url is None else _endpoint(config)
    table = tables.open_for_captions(config.data.source)
    with FolderLock(table.folder):
        if config.caption.speech is not None:
            _transcribe(table, Transcriber(config.caption.speech, resolve.device(config)))
        if endpoint is not None:
            _describe(table, config, endpoint)
    close(table.path, f"ltx-train prepare experiment=... data.source={table.path} data.root=prepared")
    return Exit.DONE


def _transcribe(table: Table, transcriber: Transcriber) -> None:
    missing = [row for row in table.rows if not sources.cell(row, "transcript")]
    silent = 0
    for number, row in enumerate(missing, start=1):
        medium = _medium(table, row)
        print(f"transcript {number}/{len(missing)} {medium.name}", file=sys.stderr, flush=True)
        mono = _sound(medium, *_part(medium, row))
        silent += mono is None
        row["transcript"] = "" if mono is None else transcriber.text(mono)
        tables.save(table)
    print(f"{len(missing) - silent} transcripts written, {len(table.rows) - len(missing)} kept, {silent} without sound")


def _describe(table: Table, config: Config, endpoint: Endpoint) -> None:
    missing = [row for row in table.rows if not _has_caption(row)]
    for number, row in enumerate(missing, start=1):
        medium = _medium(table, row)
        print(f"caption {number}/{len(missing)} {medium.name}", file=sys.stderr, flush=True)
        row[sources.column_name(row, "caption")] = _caption(config, endpoint, medium, row)
        row["reviewed"] = UNREVIEWED
        tables.save(table)
    print(f"{len(missing)} captions written, {len(table.rows) - len(missing)} kept; read them before you train on them")


def _medium(table: Table, row: dict[str, Any]) -> Path:
    medium = table.folder / (sources.cell(row, "video") or sources.cell(row, "audio"))
    if not medium.is_file():
        raise DataError(f"{medium} does not exist")
    return medium


def _has_caption(row: dict[str, Any]) -> bool:
    """In any of the columns and forms that `prepare` reads; in JSON a caption may be a list."""
    return bool(sources.captions(row))


def _endpoint(config: Config) -> Endpoint:
    c = config.caption
    assert c.url is not None
    assert c.model is not None
    key = os.environ.get(c.key_variable) if c.key_variable else None
    if c.key_variable and key is None and "://localhost" not in c.url and "://127." not in c.url:
        raise ConfigError(f"the variable {c.key_variable} is not set: export the key, or set caption.key_variable=''")
    return Endpoint(url=c.url, model=c.model, key=key, timeout_s=c.timeout_s, max_tokens=c.max_tokens)


def _caption(config: Config, endpoint: Endpoint, medium: Path, row: dict[str, Any]) -> str:
    c, (facts, start, seconds) = config.caption, _part(medium, row)
    pictures = [jpeg(picture) for picture in _pictures(medium, facts, start, seconds, config=c)] if facts.fps else []
    mono = _sound(medium, facts, start, seconds) if c.sound else None
    transcript = sources.cell(row, "transcript")
    prompt = f"{c.prompt}\nTranscript: {transcript}" if transcript else c.prompt
    return captioner.ask(endpoint, prompt, pictures, None if mono is None else _wav(mono))


def _part(medium: Path, row: dict[str, Any]) -> tuple[Facts, float, float]:
    """The file's facts, and start and seconds of the row's part of it."""
    facts = probe(medium)
    start, end = sources.span(row)
    seconds = min(end or facts.seconds, facts.seconds) - start
    if seconds <= 0:
        raise DataError(f"{medium} lasts {facts.seconds:.2f} s, and its row starts at {start:g} s")
    return facts, start, seconds


def _pictures(medium: Path, facts: Facts, start: float, seconds: float, *, config: CaptionConfig) -> list[Tensor]:
    """Frames at equal distances within a part of the file."""
    scale = min(1.0, config.size / max(facts.width, facts.height))
    size = [max(2, round(side * scale / 2) * 2) for side in (facts.width, facts.height)]
    frames = max(1, min(config.frames, round(seconds * facts.fps)))
    part = Part(
        bucket=Bucket(size[0], size[1], frames), fps=frames / seconds, start=start, framing=Framing(crop=Crop.pad)
    )
    return list(read_pixels(medium, part))


def _sound(medium: Path, facts: Facts, start: float, seconds: float) -> Tensor | None:
    """A part of the sound, (T,) mono at 16 kHz; None without one."""
    waveform, rate = read_audio(medium, facts.start + start, seconds) if facts.has_sound else (None, 0)
    if waveform is None:
        return None
    return mel.resample(mel.to_stereo(waveform).mean(dim=0, keepdim=True), rate)[0]


def _wav(mono: Tensor) -> bytes:
    """A WAV file of 16 bit."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(RATE)
        written.writeframes((mono.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
    return file.getvalue()
