"""Encoded samples in the work folder, addressed by what they were made of.

Owns the files in `items/`. An item of the same content is reused; a damaged one is made anew. Reading and measuring
know no encoder, so that they can run ahead of the encoders in threads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.data.prepare import measure, pictures
from ltx_train.data.prepare.encode import Encoders, VoiceWindows
from ltx_train.data.prepare.media import Media, read_clip, read_sound
from ltx_train.data.prepare.recipe import Recipe
from ltx_train.data.prepare.windows import Window
from ltx_train.data.reader import AUDIO, FACE_MASK, REFERENCE, VOICE
from ltx_train.model import sealed

# Of items and contexts. 2: sealed files, whose damage is found. 3: resized pixels without a cast, surround by channels.
# 4: measured, by the part of the file that they are made of.
FORMAT = 4
# Normalized sound stays this many dB below full scale.
_HEADROOM_DB = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """key: names the file. source_sha256: of the clip's file. facts: what the record of the item holds of it. new:
    whether it was encoded now."""

    key: str
    source_sha256: str
    facts: dict[str, Any]
    new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A sample that has to be encoded. measured: numbers about it as it came."""

    window: Window
    key: str
    source_sha256: str
    media: Media
    measured: dict[str, float]


def read(window: Window, recipe: Recipe, fingerprints: dict[str, str], items: Path) -> Item | Decoded:
    """The item, when it exists; what is to be encoded, when it does not. DataError when the file cannot be used."""
    source_sha = _file_sha256(window.clip.medium)
    key = _key(window, source_sha, recipe, fingerprints)
    facts = _facts(items / f"{key}.safetensors")
    if facts is not None:
        return Item(key=key, source_sha256=source_sha, facts=facts, new=False)
    clip, part = window.clip, window.part
    media = read_sound(clip.medium, part) if clip.video is None else read_clip(clip.video, part)
    measured = _measured(window, media)
    media = _normalized(media, measured, recipe.loudness)
    return Decoded(window=window, key=key, source_sha256=source_sha, media=media, measured=measured)


def write(decoded: Decoded, recipe: Recipe, encoders: Encoders, items: Path) -> Item:
    """Encodes a sample into its file."""
    path = items / f"{decoded.key}.safetensors"
    durable.write(path, _encoded(decoded, recipe, encoders))
    facts = _facts(path)
    assert facts is not None, f"{path} is damaged right after it was written"
    return Item(key=decoded.key, source_sha256=decoded.source_sha256, facts=facts, new=True)


def verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Content of a sealed file, None when it is absent or damaged."""
    try:
        return sealed.unpack(path.read_bytes())
    except (FileNotFoundError, DataError):
        return None


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _facts(path: Path) -> dict[str, Any] | None:
    """What the record of an item holds of it; None when the item is absent or damaged, and has to be encoded."""
    content = verified(path)
    return None if content is None else json.loads(content[1]["facts"])


def _encoded(decoded: Decoded, recipe: Recipe, encoders: Encoders) -> bytes:
    """The bytes of an item: its tensors, with the facts about them as metadata."""
    window, media = decoded.window, decoded.media
    clip, part = window.clip, window.part
    voice = VoiceWindows(seconds=recipe.reference_s, variants=recipe.voice_variants, key=decoded.source_sha256)
    encoded = encoders.clip(media, part, clip.files.get("reference_audio"), voice)
    encoded.tensors.update(encoders.beside(part, clip, recipe.control_grid, (window.facts.width, window.facts.height)))
    facts = {
        "bucket": str(part.bucket),
        "fps": part.fps,
        "start": round(part.start, 3),
        "seconds": part.seconds,
        "source_fps": round(window.facts.fps, 3),
        "averaged": window.facts.averaged,
        "has_audio": AUDIO in encoded.tensors,
        "voice": VOICE in encoded.tensors,
        "own_reference": REFERENCE in encoded.tensors,
        "rms_db": round(encoded.rms_db, 2),
        "measured": decoded.measured,
    }
    return sealed.pack(encoded.tensors, {"facts": json.dumps(facts, sort_keys=True)})


def _measured(window: Window, media: Media) -> dict[str, float]:
    """Numbers about the sample as it came, by name."""
    facts, part = window.facts, window.part
    measured = {"given_s": round(window.given_s, 3), "sound_late_s": round(facts.sound_late, 3)}
    if media.waveform is not None:
        measured |= measure.sound(media.waveform, media.rate)
    if media.pixels is not None:
        size, bucket = (facts.width, facts.height), (part.bucket.width, part.bucket.height)
        measured |= measure.pictures(media.pixels)
        measured |= {
            "kept": round(pictures.kept_share(size, bucket, part.framing.crop), 3),
            "enlarged": round(max(bucket[0] / size[0], bucket[1] / size[1]), 3),
        }
    return measured


def _normalized(media: Media, measured: dict[str, float], loudness: float | None) -> Media:
    """The sound at a loudness, as far as its peaks allow; the gain is added to what was measured."""
    if loudness is None or media.waveform is None or "lufs" not in measured:
        return media
    gain = min(loudness - measured["lufs"], -_HEADROOM_DB - measured["peak_db"])
    measured["gain_db"] = round(gain, 2)
    return Media(pixels=media.pixels, waveform=media.waveform * 10 ** (gain / 20), rate=media.rate)


def _key(window: Window, source_sha: str, recipe: Recipe, fingerprints: dict[str, str]) -> str:
    clip, part = window.clip, window.part
    face = None if part.framing.face is None else [repr(part.framing.face), FACE_MASK]
    made_of = [str(part.bucket), part.fps, round(part.start, 6), part.framing.crop.value, face]
    vaes = {k: v for k, v in fingerprints.items() if k.endswith("VAE")}
    files = {name: _file_sha256(path) for name, path in sorted(clip.files.items())}
    settings = [recipe.reference_s, recipe.latent_dtype, recipe.loudness, recipe.control_grid, *recipe.voice_variants]
    return digest(FORMAT, source_sha, files, clip.audio_mask, round(window.given_s, 3), made_of, settings, vaes)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
