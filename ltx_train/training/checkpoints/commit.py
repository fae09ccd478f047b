"""Checkpoints that are either complete or absent: temporary folder, fsync, manifest, rename, then prune.

Owns `checkpoints/step-N/`: trained weights and optimizer moments as safetensors, the rest as JSON. No pickle is read or
written. Each rank of a sliced state writes its own file, and rank 0 commits the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.updates import slice_files
from ltx_train.updates.slice_files import StateSlice

SCHEMA = 1
MANIFEST = "manifest.json"
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_AVERAGE = "average.safetensors"
_DONE, _PENDING = ".done", ".pending"
# How long rank 0 waits for the other ranks' files.
_PATIENCE_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """step: optimizer steps done. weights: by plain name. optimizer: as `optimizer.state_dict()`. notes: JSON values.

    average: the moving average of the weights, empty when there is none. slice: this rank's slice of a sliced state;
    `weights` and `optimizer` are empty then. name: suffix of the temporary folder, the same on all ranks.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    notes: Mapping[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    slice: StateSlice | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def published(self) -> Mapping[str, Tensor]:
        """The weights to measure and export: the moving average if there is one."""
        return self.average or self.weights


def save(folder: Path, checkpoint: Checkpoint, keep: int, protected: int | None = None) -> Path:
    """Commits a checkpoint, then removes the oldest committed ones beyond `keep`, except the protected step.

    Raises DataError when a write fails; then no partial checkpoint stays, and earlier checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    temporary = _temporary(folder, checkpoint)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        _write_parts(temporary, checkpoint)
        known = _other_files(temporary, checkpoint.slice) if checkpoint.slice is not None else {}
        _write_manifest(temporary, known)
        if final.exists():
            # Only now that the new checkpoint is complete: a kill before the rename loses this step, no other.
            shutil.rmtree(final)
        os.rename(temporary, final)
        # The rename is durable once the parent folder is flushed.
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(
            f"the checkpoint of step {checkpoint.step} could not be written to {folder} ({error})"
        ) from error
    _prune(folder, keep, protected)
    return final


def contribute(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the slice of a rank other than 0, then a mark file with its digest or error. Rank 0 waits for the mark."""
    state_slice, temporary = checkpoint.slice, _temporary(folder, checkpoint)
    assert state_slice is not None
    entry: dict[str, Any] = {}
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        slice_files.write(temporary, state_slice)
        _sync(temporary / state_slice.file)
        entry = _entry(temporary / state_slice.file)
    except (OSError, SafetensorError) as error:
        entry = {"error": str(error)}
    with contextlib.suppress(OSError):
        mark = temporary / f"{state_slice.file}{_PENDING}"
        # Renamed after the write, so that rank 0 never reads a partial mark.
        mark.write_text(json.dumps(entry))
        mark.rename(temporary / f"{state_slice.file}{_DONE}")


def committed(folder: Path) -> list[Path]:
    """Complete checkpoints, sorted by step. Folders without a matching manifest do not count."""
    return sorted(path for path in folder.glob("step-*") if ".tmp-" not in path.name and _is_complete(path))


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compares the digests of a checkpoint's files with its manifest; DataError names the file that differs.

    part, parts: check every `parts`-th file, starting with number `part`.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["schema"] != SCHEMA:
        raise DataError(f"{path} was written by another release (schema {manifest['schema']}, this one reads {SCHEMA})")
    for name, entry in list(manifest["files"].items())[part::parts]:
        if _sha256(path / name) != entry["sha256"]:
            raise DataError(f"{path / name} is damaged: remove {path} to continue from the checkpoint before it")


def notes(path: Path) -> Mapping[str, Any]:
    """Reads the notes of a checkpoint, without its tensors."""
    return json.loads((path / _STATE).read_text())["notes"]


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Reads a checkpoint, after `verify` unless verified. Tensors of a sliced one are read from disk at each access."""
    if not verified:
        verify(path)
    state = json.loads((path / _STATE).read_text())
    if (path / slice_files.LAYOUT).is_file():
        sliced = slice_files.SlicedState(path)
        return Checkpoint(step=state["step"], weights=sliced.weights, optimizer=sliced.optimizer, notes=state["notes"])
    tensors = load_file(path / _OPTIMIZER)
    optimizer = {"state": _nested(tensors, state["optimizer"]["state"]), "param_groups": state["optimizer"]["groups"]}
    average = load_file(path / _AVERAGE) if (path / _AVERAGE).is_file() else {}
    return Checkpoint(
        step=state["step"],
        weights=load_file(path / _WEIGHTS),
        optimizer=optimizer,
        notes=state["notes"],
        average=average,
    )


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    state = {"step": checkpoint.step, "notes": checkpoint.notes, "torch": torch.__version__}
    if checkpoint.slice is not None:
        slice_files.write(folder, checkpoint.slice)
        (folder / _STATE).write_text(json.dumps(state, indent=1))
        return
    save_file({k: v.detach().cpu().contiguous() for k, v in checkpoint.weights.items()}, folder / _WEIGHTS)
    if checkpoint.average:
        save_file({k: v.detach().cpu().contiguous() for k, v in checkpoint.average.items()}, folder / _AVERAGE)
    flat = dict(_flat(checkpoint.optimizer["state"]))
    # 8-bit optimizers share their tables between parameters, which safetensors refuses.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in flat.items() if isinstance(v, Tensor)}
    save_file(tensors, folder / _OPTIMIZER)
    numbers = {k: v for k, v in flat.items() if not isinstance(v, Tensor)}
    optimizer = {"state": numbers, "groups": checkpoint.optimizer["param_groups"]}
    (folder / _STATE).write_text(json.dumps({**state, "optimizer": optimizer}, indent=1))


def _other_files(folder: Path, state_slice: StateSlice) -> dict[str, Any]:
    """Waits for the files of the other ranks and returns their manifest entries; OSError when a rank fails or hangs."""
    entries: dict[str, Any] = {}
    deadline = time.monotonic() + _PATIENCE_S
    for rank in range(1, state_slice.world):
        name = replace(state_slice, rank=rank).file
        mark = folder / f"{name}{_DONE}"
        while not mark.is_file():
            if time.monotonic() > deadline:
                raise OSError(f"rank {rank} has not written its file within {_PATIENCE_S / 60:.0f} min")
            time.sleep(0.05)
        entries[name] = json.loads(mark.read_text())
        if "error" in entries[name]:
            raise OSError(f"rank {rank}: {entries[name]['error']}")
        mark.unlink()
    return entries


def _flat(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested optimizer state by `index/key/...` names. bitsandbytes nests one level deeper than torch."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _nested(*flats: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Inverse of `_flat`. The first part of a name is the parameter's index."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in (pair for flat in flats for pair in flat.items()):
        index, *path, leaf = name.split("/")
        node = state.setdefault(int(index), {})
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return state


def _write_manifest(folder: Path, known: Mapping[str, Any]) -> None:
    """Writes the manifest, which commits the checkpoint, and flushes it after all files that it lists. known: entries
    of files that other ranks have flushed."""
    files: dict[str, Any] = dict(known)
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            _sync(path)
            files[path.name] = _entry(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=1))
    _sync(manifest)
    _sync(folder)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _temporary(folder: Path, checkpoint: Checkpoint) -> Path:
    return folder / f"step-{checkpoint.step:06d}.tmp-{checkpoint.name}"


def _is_complete(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _prune(folder: Path, keep: int, protected: int | None) -> None:
    for old in committed(folder)[:-keep]:
        if old.name == f"step-{protected or 0:06d}":
            continue
        shutil.rmtree(old)
    for half in folder.glob("step-*.tmp-*"):
        shutil.rmtree(half, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
