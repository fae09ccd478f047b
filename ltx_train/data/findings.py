"""Findings about clips as they were recorded and cut: what of the measured numbers is worth a word.

Owns the thresholds and the sentences, each with its mend. Pure: it reads an index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ltx_train.data.index import Index
from ltx_train.data.record import Record

# Relative difference of two frame rates that are one: a minute apart by two frames of 30 a second.
_SAME_RATE = 1e-3 / 2
_MOST_NAMES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of the audit. An error makes `check` fail and `fit` refuse to start; a warning is only shown.

    keys: the samples that it is about, empty when it is about the folder. kind: the name under which `data.accept` lets
    a run train in spite of an error, empty where no run can.
    """

    error: bool
    text: str
    keys: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Remark:
    """What is worth a word about one clip. kind: what clips are filtered by."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _Rule:
    """applies: whether a record has the fault. says: what is wrong with it. advice: what to do, for all of them."""

    kind: str
    applies: Callable[[Record], bool]
    says: Callable[[Record], str]
    advice: str


def _number(record: Record, name: str, default: float = 0.0) -> float:
    return record.measured.get(name, default)


_SOUND = (
    _Rule(
        "clipped",
        lambda r: _number(r, "clipped") > 0.001,
        lambda r: f"{100 * _number(r, 'clipped'):.1f} % of the sound is clipped",
        "take a recording with headroom: no normalisation brings peaks back",
    ),
    _Rule(
        "quiet",
        lambda r: _number(r, "lufs") < -40,
        lambda r: f"very quiet ({_number(r, 'lufs'):.0f} LUFS)",
        "data.loudness=-14 brings sounds to one loudness, and their noise with them",
    ),
    _Rule(
        "late start",
        lambda r: _number(r, "leading_s") > 0.5,
        lambda r: f"{_number(r, 'leading_s'):.1f} s of silence before the first sound",
        "data.trim_silence=true starts clips at their first sound",
    ),
    _Rule(
        "pauses",
        lambda r: _number(r, "leading_s") <= 0.5 and _number(r, "pauses") > 0.4,
        lambda r: f"{100 * _number(r, 'pauses'):.0f} % of the sound is silence",
        "cut such clips tighter (columns start and end), or take data.windows=loudest",
    ),
    _Rule(
        "no voice",
        lambda r: _number(r, "voiced", 1.0) < 0.1,
        lambda _: "no voice is heard",
        "noise, or music without a voice, teaches no voice: leave such clips out unless that is what you train",
    ),
    _Rule(
        "noisy",
        lambda r: (
            _number(r, "voiced", 1.0) >= 0.1 and _number(r, "snr_db", 99.0) < 8 and _number(r, "clipped") <= 0.001
        ),
        lambda r: f"noisy ({_number(r, 'snr_db'):.0f} dB between loud and quiet parts)",
        "a LoRA learns the room and the noise with the voice",
    ),
    _Rule(
        "narrow band",
        lambda r: _number(r, "voiced", 1.0) >= 0.1 and _number(r, "band_hz", 9e9) < 4000,
        lambda r: f"nothing above {_number(r, 'band_hz') / 1000:.1f} kHz",
        "a telephone or a strongly compressed file: voices sound dull from it",
    ),
    _Rule(
        "sound offset",
        lambda r: abs(_number(r, "sound_late_s")) > 0.1,
        lambda r: (
            f"sound {abs(_number(r, 'sound_late_s')):.2f} s {'late' if _number(r, 'sound_late_s') > 0 else 'early'}"
        ),
        "the file's streams do not start together: see that lips and voice agree",
    ),
)
_PICTURE = (
    _Rule(
        "cropped",
        lambda r: _number(r, "kept", 1.0) < 0.6,
        lambda r: f"only {100 * _number(r, 'kept'):.0f} % of the picture is used",
        "add a bucket of its shape to data.buckets, or say what to keep with data.crop=top, face or pad",
    ),
    _Rule(
        "small file",
        lambda r: _number(r, "enlarged") > 1.05,
        lambda r: f"enlarged {_number(r, 'enlarged'):.1f} times",
        "its file is smaller than the bucket: take a smaller bucket, or a better copy",
    ),
    _Rule(
        "blurred",
        lambda r: _number(r, "enlarged") <= 1.05 and _number(r, "detail_db") > 42,
        lambda _: "blurred, or enlarged before",
        "the pictures hold no more than half their size does: look for the original",
    ),
    _Rule(
        "cut",
        lambda r: "cut_frame" in r.measured,
        lambda r: f"a cut at {r.start + _number(r, 'cut_frame') / r.fps:.2f} s",
        "a model learns the cut: use the columns start and end, or shorter buckets",
    ),
    _Rule(
        "black",
        lambda r: _number(r, "dark") > 0.1,
        lambda r: f"{100 * _number(r, 'dark'):.0f} % of the frames are black",
        "cut them off with the columns start and end",
    ),
    _Rule(
        "still",
        lambda r: _number(r, "still") > 0.98,
        lambda _: "the picture stands still",
        "a model learns to freeze: leave still clips out, or train them as pictures (one frame)",
    ),
    _Rule(
        "unused part",
        lambda r: _number(r, "given_s") > 1.25 * r.seconds + 0.5,
        lambda r: f"{r.seconds:.1f} of {_number(r, 'given_s'):.1f} s are used, and the caption may tell of all",
        "data.windows=all uses the rest too, columns start and end or a longer bucket choose",
    ),
)


def of_clips(index: Index, *, sound: bool = True, pictures: bool = True) -> Iterator[Finding]:
    """One warning for each kind of fault, with its samples. A recording in several parts is whole.

    sound, pictures: whether they are trained.
    """
    parts: dict[str, int] = {}
    for record in index.records:
        parts[record.recording] = parts.get(record.recording, 0) + 1
    single = [record for record in index.records if parts[record.recording] == 1]
    for rule in (*(_SOUND if sound else ()), *(_PICTURE if pictures else ())):
        records = single if rule is _PICTURE[-1] else index.records
        found = [record for record in records if rule.applies(record)]
        if found:
            yield _warning(found, rule)
    yield from conversions(index)


def _warning(found: list[Record], rule: _Rule) -> Finding:
    more = ", ..." if len(found) > _MOST_NAMES else ""
    named = ", ".join(f"{record.key}: {rule.says(record)}" for record in found[:_MOST_NAMES])
    count = "" if len(found) == 1 else f"{len(found)} clips: "
    return Finding(False, f"{count}{named}{more}; {rule.advice}", tuple(record.key for record in found))


def of_record(record: Record) -> list[Remark]:
    """What is worth a word about one clip, without advice."""
    return [Remark(rule.kind, rule.says(record)) for rule in (*_SOUND, *_PICTURE) if rule.applies(record)]


def conversions(index: Index) -> Iterator[Finding]:
    """What preparation had to change of clips beyond their size."""
    rates: dict[float, list[str]] = {}
    layouts: dict[str, list[str]] = {}
    for record in index.records:
        if record.source_fps and abs(record.source_fps - record.fps) > _SAME_RATE * record.fps:
            rates.setdefault(record.source_fps, []).append(record.key)
        if record.averaged:
            layouts.setdefault(record.averaged, []).append(record.key)
    for rate, keys in sorted(rates.items()):
        yield Finding(
            False,
            f"{_named(keys)} of {rate:g} frames a second were converted to data.fps={index.settings.get('fps')}: "
            "frames are shown twice or left out, and a model learns that; data.fps=source keeps them as they are",
            tuple(keys),
        )
    for layout, keys in sorted(layouts.items()):
        text = f"{_named(keys)} with sound in {layout}, whose channels were averaged: mix it to stereo"
        yield Finding(False, text, tuple(keys))


def _named(keys: list[str]) -> str:
    """The number of clips and the first names."""
    more = ", ..." if len(keys) > _MOST_NAMES else ""
    return f"{len(keys)} clip{'s' if len(keys) > 1 else ''} ({', '.join(keys[:_MOST_NAMES])}{more})"
