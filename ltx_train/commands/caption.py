"""`ltx-train caption`: captions by a model, for the clips of a table or a folder that have none."""

from __future__ import annotations

import io
import os
import sys
import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.config.schema.commands import CaptionConfig
from ltx_train.contracts import ConfigError, DataError, Exit
from ltx_train.data.footage import captioner
from ltx_train.data.footage.captioner import Endpoint
from ltx_train.data.prepare import sources, tables
from ltx_train.data.prepare.media import Facts, Part, probe, read_pixels
from ltx_train.data.prepare.pictures import Crop, Framing
from ltx_train.data.prepare.sound import read_audio
from ltx_train.data.prepare.sources import UNREVIEWED
from ltx_train.diffusion.grid import Bucket
from ltx_train.jobs.folder_lock import FolderLock
from ltx_train.model import mel
from ltx_train.sampling.media import jpeg

_RATE = 16000


def run(config: Config) -> int:
    """Fills the captions that are missing. The table is written after each, so that nothing answered is lost."""
    assert config.data.source is not None  # config.require has refused it
    endpoint = _endpoint(config)
    table = tables.open_for_captions(config.data.source)
    missing = [row for row in table.rows if not _has_caption(row)]
    with FolderLock(table.folder):
        for number, row in enumerate(missing, start=1):
            medium = table.folder / (sources.cell(row, "video") or sources.cell(row, "audio"))
            print(f"caption {number}/{len(missing)} {medium.name}", file=sys.stderr, flush=True)
            row[sources.column_name(row, "caption")] = _caption(config, endpoint, medium, row)
            row["reviewed"] = UNREVIEWED
            tables.save(table)
    print(f"{len(missing)} captions written, {len(table.rows) - len(missing)} kept; read them before you train on them")
    close(table.path, f"ltx-train prepare experiment=... data.source={table.path} data.root=prepared")
    return Exit.DONE


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
    if not medium.is_file():
        raise DataError(f"{medium} does not exist")
    c, facts = config.caption, probe(medium)
    start, end = sources.span(row)
    seconds = min(end or facts.seconds, facts.seconds) - start
    if seconds <= 0:
        raise DataError(f"{medium} lasts {facts.seconds:.2f} s, and its row starts at {start:g} s")
    pictures = [jpeg(picture) for picture in _pictures(medium, facts, start, seconds, config=c)] if facts.fps else []
    sound = _wav(medium, facts.start + start, seconds) if c.sound and facts.has_sound else None
    transcript = sources.cell(row, "transcript")
    prompt = f"{c.prompt}\nTranscript: {transcript}" if transcript else c.prompt
    return captioner.ask(endpoint, prompt, pictures, sound)


def _pictures(medium: Path, facts: Facts, start: float, seconds: float, *, config: CaptionConfig) -> list[Tensor]:
    """Frames at equal distances within a part of the file."""
    scale = min(1.0, config.size / max(facts.width, facts.height))
    size = [max(2, round(side * scale / 2) * 2) for side in (facts.width, facts.height)]
    frames = max(1, min(config.frames, round(seconds * facts.fps)))
    part = Part(
        bucket=Bucket(size[0], size[1], frames), fps=frames / seconds, start=start, framing=Framing(crop=Crop.pad)
    )
    return list(read_pixels(medium, part))


def _wav(medium: Path, start: float, seconds: float) -> bytes | None:
    """A part of the sound as a WAV file: mono, 16 kHz, 16 bit."""
    waveform, rate = read_audio(medium, start, seconds)
    if waveform is None:
        return None
    mono = mel.resample(mel.to_stereo(waveform).mean(dim=0, keepdim=True), rate)[0]
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(_RATE)
        written.writeframes((mono.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
    return file.getvalue()
