"""The clips of check.html: latents through the decoders, beside the same part of their files."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_train import terminal
from ltx_train.assembly import encoder_builder, from_config, resolve
from ltx_train.config import Config
from ltx_train.contracts import DataError
from ltx_train.data import findings
from ltx_train.data.findings import Remark
from ltx_train.data.index import Index
from ltx_train.data.page import Card, Look
from ltx_train.data.prepare import windows
from ltx_train.data.prepare.media import Media, read_clip, read_sound
from ltx_train.data.prepare.sources import read_source
from ltx_train.data.prepare.windows import Window
from ltx_train.data.reader import AUDIO, VIDEO, Reader
from ltx_train.data.record import Record
from ltx_train.sampling import media
from ltx_train.sampling.media import Sound

# Pixels of a picture's longer side on the page.
_WIDEST = 320
# Below it a VAE does not know what it encodes.
_POOR_DB = 20.0
# Browsers become slow beyond it.
_MOST_CARDS = 2000


def cards(config: Config, root: Path, index: Index) -> Iterator[Card]:
    """One card for each clip, at most 2000. The first `check.previews` have pictures and sound: clips with findings,
    then others at equal distances in the index, whose order the remaining cards keep."""
    shown = {record.key for record in _chosen(index, config.check.previews)}
    listed = {record.key for record in _chosen(index, _MOST_CARDS)}
    originals = _originals(config, {record.recording for record in index.records if record.key in shown})
    decoder = None
    reader = Reader(root, index, seed=0)
    ordered = sorted(index.records, key=lambda record: record.key not in shown)
    for record in terminal.each("drawing", [record for record in ordered if record.key in listed]):
        told = findings.of_record(record)
        if record.key not in shown:
            yield Card(record=record, remarks=told)
            continue
        if decoder is None:
            decoder = encoder_builder.decoder(config, resolve.device(config))
        tensors = reader.tensors(record)
        yield _card(record, told, media.decode(decoder, tensors.get(VIDEO), tensors.get(AUDIO)), originals)


def _chosen(index: Index, count: int) -> list[Record]:
    told = [record for record in index.records if findings.of_record(record)][:count]
    keys, left = {record.key for record in told}, count - len(told)
    rest = [record for record in index.records if record.key not in keys]
    return told + rest[:: max(1, len(rest) // max(1, left))][:left]


def _originals(config: Config, recordings: set[str]) -> dict[str, Window]:
    """The parts of the files that samples of these recordings were made of; without those whose footage is gone."""
    if config.data.source is None or not recordings:
        return {}
    found: dict[str, Window] = {}
    try:
        clips = [clip for clip in read_source(config.data.source, config.data.caption) if clip.key in recordings]
    except DataError:
        return {}
    cutting = from_config.recipe(config).cutting
    for clip in clips:
        with suppress(DataError):
            found |= {window.key: window for window in windows.of_clip(clip, cutting)}
    return found


def _read(window: Window) -> Media | None:
    """The part of the file; None when it cannot be read any more."""
    try:
        medium, part = window.clip.medium, window.part
        return read_sound(medium, part) if window.clip.video is None else read_clip(medium, part)
    except DataError:
        return None


def _card(
    record: Record, told: list[Remark], decoded: tuple[Tensor | None, Sound | None], originals: Mapping[str, Window]
) -> Card:
    original = psnr = None
    source = _read(originals[record.key]) if record.key in originals else None
    if source is not None:
        original = _look(source.pixels, None if source.waveform is None else Sound(source.waveform, source.rate))
        if source.pixels is not None and decoded[0] is not None:
            psnr = _psnr(source.pixels, decoded[0])
            poor = Remark("poor reconstruction", f"reconstruction {psnr:.0f} dB: the VAE does not know such pictures")
            told = [*told, poor] if psnr < _POOR_DB else told
    return Card(record=record, remarks=told, decoded=_look(*decoded), original=original, psnr=psnr)


def _psnr(first: Tensor, second: Tensor) -> float:
    error = float((first.float() - second.float()).square().mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


def _look(pixels: Tensor | None, sound: Sound | None) -> Look:
    frames: list[str] = []
    if pixels is not None:
        picked = dict.fromkeys((0, len(pixels) // 2, len(pixels) - 1))
        frames = [f"data:image/jpeg;base64,{_coded(media.jpeg(_small(pixels[n])))}" for n in picked]
    return Look(frames=frames, sound=None if sound is None else f"data:audio/mp4;base64,{_coded(_mp4(sound))}")


def _small(picture: Tensor) -> Tensor:
    """(H, W, 3) uint8, no side longer than the page shows."""
    scale = min(1.0, _WIDEST / max(picture.shape[:2]))
    size = [max(2, round(side * scale / 2) * 2) for side in picture.shape[:2]]
    planes = F.interpolate(picture.permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True)
    return planes[0].clamp(0, 255).permute(1, 2, 0).round().to(torch.uint8)


def _mp4(sound: Sound) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        stereo = Sound(sound.waveform[:2].clamp(-1, 1), sound.rate)
        media.write_mp4(Path(folder) / "sound.mp4", None, stereo, 25.0)
        return (Path(folder) / "sound.mp4").read_bytes()


def _coded(data: bytes) -> str:
    return base64.b64encode(data).decode()
