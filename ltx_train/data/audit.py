"""What can be wrong with prepared data, looked for before anything is trained on it.

Owns the findings; reads shards, decodes nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.contracts import DataError, Mode, Role
from ltx_train.data.index import HELDOUT, TRAIN, Index, Record
from ltx_train.data.order import Address
from ltx_train.data.reader import AUDIO, REFERENCE, VIDEO, Reader
from ltx_train.diffusion import positions


@dataclass(frozen=True, slots=True)
class Finding:
    """An error makes `check` fail and `fit` refuse; a warning is shown."""

    error: bool
    text: str


def audit(root: Path, index: Index, mode: Mode, stale: Sequence[str], silence_db: float) -> list[Finding]:
    """Everything at once, so that a user mends all in one go."""
    findings = [Finding(True, f"stale: {reason}; run prepare again") for reason in stale]
    findings += _splits(index)
    findings += _files(root, index)
    if any(f.error for f in findings if "shard" in f.text):
        return findings
    reader = Reader(root, index, seed=0, references=mode.uses_reference)
    for record in index.records:
        try:
            findings += [Finding(True, f"{record.key}: {text}") for text in _sample(reader, record, mode, silence_db)]
        except DataError as error:
            findings.append(Finding(True, str(error)))
    findings += [Finding(False, f"set aside by prepare: {key}: {why}") for key, why in index.quarantined.items()]
    return findings


def _splits(index: Index) -> Iterator[Finding]:
    train, heldout = ({r.speaker for r in index.split(name)} for name in (TRAIN, HELDOUT))
    for speaker in sorted(train & heldout):
        yield Finding(True, f"speaker {speaker!r} is in both splits: the held-out numbers would be worthless")
    if not train:
        yield Finding(True, "the training split is empty: lower data.heldout_speakers or add clips")
    if not heldout:
        yield Finding(False, "nothing is held out: there will be no held-out loss and no reference gap")
    elif len(heldout) < 3:
        yield Finding(False, f"only {len(heldout)} held-out identities: intervals over identities will be wide")


def _files(root: Path, index: Index) -> Iterator[Finding]:
    for shard in index.shards:
        path = root / "shards" / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            found = "missing" if size is None else f"{size} bytes instead of {shard.size}"
            yield Finding(True, f"shard {path} is {found}: run prepare again")


def _sample(reader: Reader, record: Record, mode: Mode, silence_db: float) -> Iterator[str]:
    tensors = reader.tensors(record)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            yield f"{name} holds numbers that are not finite"
        elif tensor.numel() > 1 and float(tensor.float().std()) < 1e-6:
            yield f"{name} is constant"
    if mode.video is not Role.absent:
        yield from _video_fits(record, tensors.get(VIDEO))
    if mode.audio is not Role.absent:
        yield from _audio_fits(record, tensors.get(AUDIO), silence_db)
    if mode.uses_reference:
        yield from _references(reader, record, tensors)


def _video_fits(record: Record, latent: Tensor | None) -> Iterator[str]:
    width, height, frames = (int(n) for n in record.bucket.split("x"))
    wanted = (positions.latent_frames(frames), height // 32, width // 32)
    if latent is None:
        yield "no video latent"
    elif tuple(latent.shape[1:]) != wanted:
        yield f"the video latent is {list(latent.shape[1:])}, the bucket {record.bucket} needs {list(wanted)}"


def _audio_fits(record: Record, latent: Tensor | None, silence_db: float) -> Iterator[str]:
    wanted = positions.audio_latents(record.seconds)
    if latent is None:
        yield "no audio, but the mode needs it"
        return
    if latent.shape[1] != wanted:
        yield f"{latent.shape[1]} audio latents beside {record.seconds:g} s of video, which needs {wanted}"
    if record.rms_db < silence_db:
        yield f"silent ({record.rms_db:.0f} dB)"


def _references(reader: Reader, record: Record, tensors: dict[str, Tensor]) -> Iterator[str]:
    key = reader.reference_key(Address(record.key, 0))
    if key == record.key and AUDIO in tensors and REFERENCE in tensors:
        reference, target = tensors[REFERENCE], tensors[AUDIO]
        shared = min(reference.shape[1], target.shape[1])
        if torch.allclose(reference[:, :shared], target[:, :shared], atol=1e-3):
            yield "its reference is its own target: the model would learn to copy"
    elif key != record.key and reader.records[key].source_sha256 == record.source_sha256:
        yield f"its reference {key} is the same recording"
