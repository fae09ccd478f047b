"""Audit of prepared data: looks for faults in the samples before a run trains on them.

Owns the checks of samples. It reads shards; it decodes nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx_train import terminal
from ltx_train.contracts import SPEAKER, Condition, ConditionKind, DataError, ModalityName, Mode, Role
from ltx_train.data import copies, store
from ltx_train.data.findings import Finding, of_clips
from ltx_train.data.index import HELDOUT, TRAIN, Index
from ltx_train.data.order import Address
from ltx_train.data.reader import AUDIO, AUDIO_MASK, FACE_MASK, REFERENCE, VIDEO, VIDEO_MASK, Reader, ReadRequest
from ltx_train.data.record import Record
from ltx_train.diffusion import references
from ltx_train.diffusion.grid import Bucket, audio_latents

_MOST_NAMES, _FEW_UNITS = 5, 3


@dataclass(frozen=True, slots=True)
class DataRequirements:
    """What a run needs from the data.

    modes: the modes that it trains. request: what the reader reads of a clip for these modes.
    silence_db: the loudness below which sound counts as silent, in dB of full scale.
    """

    modes: tuple[Mode, ...]
    request: ReadRequest
    silence_db: float

    def role(self, name: ModalityName) -> bool:
        """Whether any mode needs the modality."""
        return any(mode.role(name) is not Role.absent for mode in self.modes)

    def masked_streams(self, mask: str) -> frozenset[ModalityName]:
        """The modalities whose tokens a condition keeps clean where the mask is set."""
        conditions = (c for mode in self.modes for c in mode.conditions if c.kind is ConditionKind.mask)
        return frozenset(c.stream for c in conditions if c.source == mask)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a sample. kind: as in `Finding`."""

    text: str
    kind: str = ""


def audit(
    root: Path, index: Index, requirements: DataRequirements, stale: Sequence[str], *, reads: bool = True
) -> list[Finding]:
    """Runs all checks and returns every finding, so that a user can fix all faults in one pass.

    `stale` lists the reasons why the folder is stale. With a damaged shard, the samples are not read. reads: False
    leaves out all that needs the samples' bytes, as of a folder whose shards are in a store.
    """
    findings = [Finding(True, f"stale: {reason}; run prepare again") for reason in stale]
    findings += _splits(index)
    findings += of_clips(
        index, sound=requirements.role(ModalityName.audio), pictures=requirements.role(ModalityName.video)
    )
    findings += _files(root, index) if store.settings_of(root) is None else ()
    if not reads or any(f.error for f in findings if "shard" in f.text):
        return findings
    reader = Reader(root, index, seed=0, request=requirements.request)
    signatures: dict[str, Tensor] = {}
    undamaged: set[tuple[str, int]] = set()
    for record in terminal.each("checking", index.records):
        try:
            tensors = reader.tensors(record)
            found = copies.signature(tensors)
            signatures |= {} if found is None else {record.key: found}
            for number, member in enumerate(record.contexts):
                if (record.shard, member.offset) not in undamaged:
                    reader.read_context(record, number)
                    undamaged.add((record.shard, member.offset))
            faults = _sample(reader, record, requirements, tensors)
            findings += [Finding(True, f"{record.key}: {f.text}", (record.key,), f.kind) for f in faults]
        except DataError as error:
            findings.append(Finding(True, str(error), (record.key,)))
    findings += _copies(index, signatures)
    findings += [Finding(False, f"set aside by prepare: {key}: {why}") for key, why in index.quarantined.items()]
    return findings


def _splits(index: Index) -> Iterator[Finding]:
    train, heldout = ({*index.split(name).distinct("speaker")} for name in (TRAIN, HELDOUT))
    if index.by_clip:
        shared = ", ".join(sorted(train & heldout)[:_MOST_NAMES])
        yield Finding(
            False,
            f"clips of {shared} are in both splits: held-out losses tell whether clips are memorised, not how new "
            "people fare",
        )
    if not train:
        yield Finding(True, "the training split is empty: lower data.heldout_speakers or add clips")
    if not heldout:
        yield Finding(
            False,
            "the held-out split is empty: there will be no held-out loss and no reference gap; with one person, "
            "data.heldout_clips=3 holds out clips",
        )
        return
    units = len({index.unit(r) for r in index.split(HELDOUT)})
    if units < _FEW_UNITS:
        kind = "clips" if index.by_clip else "identities"
        yield Finding(False, f"only {units} held-out {kind}: confidence intervals will be wide")


def _files(root: Path, index: Index) -> Iterator[Finding]:
    for shard in index.shards:
        path = root / "shards" / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            fault = "is missing" if size is None else f"has {size} bytes instead of {shard.size}"
            yield Finding(True, f"shard {path} {fault}: run prepare again")


def _copies(index: Index, signatures: Mapping[str, Tensor]) -> Iterator[Finding]:
    splits = {record.key: record.split for record in index.records}
    for first, second in copies.pairs(index, signatures):
        if splits[first] != splits[second]:
            text = f"{first} and {second} are one recording, in both splits: the held-out loss would measure memory; "
            yield Finding(True, text + "leave one out, or put both into one split", (first, second), "copies")
        else:
            yield Finding(False, f"{first} and {second} are one recording: leave one out", (first, second))


def _sample(
    reader: Reader, record: Record, requirements: DataRequirements, tensors: Mapping[str, Tensor]
) -> Iterator[Fault]:
    masks = {*requirements.request.masks, VIDEO_MASK, AUDIO_MASK, FACE_MASK}  # a face may fill the picture
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            yield Fault(f"{name} holds numbers that are not finite")
        elif name not in masks and tensor.numel() > 1 and float(tensor.float().std()) < 1e-6:
            yield Fault(f"{name} is constant", "constant")
    if requirements.role(ModalityName.video):
        yield from _video_fits(record, tensors.get(VIDEO))
    if requirements.role(ModalityName.audio):
        yield from _audio_fits(record, tensors.get(AUDIO), requirements.silence_db)
    for name in sorted(requirements.request.masks):
        yield from _mask_fits(name, tensors, requirements.masked_streams(name))
    for condition in requirements.request.references.values():
        yield from _reference(reader, record, condition, tensors)


def _video_fits(record: Record, latent: Tensor | None) -> Iterator[Fault]:
    expected = Bucket(*(int(n) for n in record.bucket.split("x"))).latents
    if latent is None:
        yield Fault("no video latent")
    elif tuple(latent.shape[1:]) != expected:
        yield Fault(f"the video latent is {list(latent.shape[1:])}, but bucket {record.bucket} needs {list(expected)}")


def _audio_fits(record: Record, latent: Tensor | None, silence_db: float) -> Iterator[Fault]:
    expected = audio_latents(record.seconds)
    if latent is None:
        yield Fault("no audio, but the mode needs it")
        return
    if latent.shape[1] != expected:
        yield Fault(f"{latent.shape[1]} audio latents beside {record.seconds:g} s of video, which needs {expected}")
    if record.rms_db < silence_db:
        yield Fault(f"silent ({record.rms_db:.0f} dB)", "silent")


def _mask_fits(name: str, tensors: Mapping[str, Tensor], conditioned: frozenset[ModalityName]) -> Iterator[Fault]:
    """conditioned: the modalities whose tokens the mask keeps clean; empty for a mask that only weighs the loss."""
    mask = tensors.get(name)
    if mask is None:
        yield Fault(f"no {name} in the shards, but the mode or the loss reads it")
        return
    grids = {ModalityName.video: tensors[VIDEO].shape[1:]} if VIDEO in tensors else {}
    grids |= {ModalityName.audio: tensors[AUDIO].shape[1:2]} if AUDIO in tensors else {}
    wrong = [stream for stream in conditioned if grids.get(stream) != mask.shape]
    if wrong or mask.shape not in grids.values():
        grid = f"the grid of the {wrong[0]} latent" if wrong else "the grid of the video or of the audio latent"
        yield Fault(f"{name} has the shape {list(mask.shape)}, not {grid}")
    elif float(mask.min()) < 0 or float(mask.max()) > 1:
        yield Fault(f"{name} has values outside [0, 1]")
    elif conditioned and float(mask.min()) > 0.5:
        yield Fault(f"{name} gives every place: nothing would be left to predict")


def _reference(reader: Reader, record: Record, condition: Condition, tensors: Mapping[str, Tensor]) -> Iterator[Fault]:
    key = reader.reference_key(Address(record.key, 0), condition)
    if key != record.key:
        if reader.records[key].source_sha256 == record.source_sha256:
            yield Fault(f"its reference {key} comes from the same recording", "same_recording")
        return
    target = tensors.get(AUDIO if condition.stream is ModalityName.audio else VIDEO)
    reference = tensors.get(REFERENCE if condition.source == SPEAKER else condition.source)
    if reference is None:
        yield Fault(f"no {condition.source} in the shards, but a reference of the mode reads it")
    elif target is not None and _same(reference.float(), target.float()):
        yield Fault("its reference is its own target: the model would learn to copy")
    elif target is not None and target.ndim == 4:
        yield from _scales(reference[None], target[None], condition)


def _scales(reference: Tensor, target: Tensor, condition: Condition) -> Iterator[Fault]:
    try:
        if condition.spatial_scale is None:
            references.spatial_scale(reference, target)
        if condition.temporal_scale is None:
            references.temporal_scale(reference, target)
    except DataError as error:
        yield Fault(str(error))


def _same(reference: Tensor, target: Tensor) -> bool:
    shared = min(reference.shape[1], target.shape[1])
    reference, target = reference[:, :shared], target[:, :shared]
    return reference.shape == target.shape and torch.allclose(reference, target, atol=1e-3)
