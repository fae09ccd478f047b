"""Checkpoints that are either complete or absent: temporary folder, fsync, manifest, rename, then prune.

Owns `checkpoints/step-N/`: trained weights and optimizer moments as safetensors, the rest as JSON. No pickle is read or
written. Each rank of a sliced state writes its own file, and rank 0 commits the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.training.checkpoints import manifest
from ltx_train.training.checkpoints.manifest import Entry
from ltx_train.updates import slice_files
from ltx_train.updates.slice_files import StateSlice

# The settings that a checkpoint was made with.
SETTINGS = "config.yaml"
_WEIGHTS, _OPTIMIZER, _STATE = manifest.WEIGHTS, "optimizer.safetensors", manifest.STATE
_AVERAGE = "average.safetensors"
_NAME = re.compile(r"step-\d+")
_DONE = ".done"
# How long rank 0 waits for the other ranks' files.
_PATIENCE_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """step: optimizer steps done. weights: by plain name. optimizer: as `optimizer.state_dict()`. notes: JSON values.

    average: the moving average of the weights, empty when there is none. slice: this rank's slice of a sliced state;
    `weights` and `optimizer` are empty then. settings: text of the run's configuration. name: suffix of the temporary
    folder, the same on all ranks.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    notes: Mapping[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    slice: StateSlice | None = None
    settings: str = ""
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
        if checkpoint.settings:
            (temporary / SETTINGS).write_text(checkpoint.settings, encoding="utf-8")
        known = _other_files(temporary, checkpoint.slice) if checkpoint.slice is not None else {}
        manifest.write(temporary, known)
        replaced = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        if final.exists():
            # Only now that the new checkpoint is complete: a kill before the second rename loses this step, no other.
            os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced, ignore_errors=True)
        # The rename is durable once the parent folder is flushed.
        durable.sync(folder)
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
        durable.sync(temporary / state_slice.file)
        entry = asdict(manifest.entry(temporary / state_slice.file))
    except (OSError, SafetensorError) as error:
        entry = {"error": str(error)}
    with contextlib.suppress(OSError):
        # Flushed and renamed, so that rank 0 reads no partial mark, on another machine either.
        durable.write(temporary / f"{state_slice.file}{_DONE}", json.dumps(entry))


def committed(folder: Path) -> list[Path]:
    """Complete checkpoints, sorted by step. Folders without a matching manifest do not count."""
    return sorted((path for path in _named(folder) if manifest.is_complete(path)), key=step_of)


def damaged(folder: Path) -> list[Path]:
    """Checkpoints by name that are not complete, sorted by step."""
    return sorted((path for path in _named(folder) if not manifest.is_complete(path)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name. Names have six digits or more, so they do not sort as text."""
    return int(path.name.removeprefix("step-"))


def remove_halves(folder: Path) -> None:
    """Removes what killed processes have left of their saves. Call it while no other process writes to the folder:
    before the first save, whose room it may take."""
    for half in folder.glob("step-*.tmp-*"):
        shutil.rmtree(half, ignore_errors=True)


def _named(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]


def notes(path: Path) -> Mapping[str, Any]:
    """Reads the notes of a checkpoint, without its tensors. DataError when they are damaged."""
    return _state(path)["notes"]


def settings(path: Path) -> str:
    """The text of the configuration that a checkpoint was made with; empty for one of 0.1.0 or 0.2.0. DataError when it
    is damaged."""
    listed = manifest.read(path).get(SETTINGS)
    if listed is None:
        return ""
    if not (path / SETTINGS).is_file() or manifest.entry(path / SETTINGS) != listed:
        raise DataError(f"{path / SETTINGS} is damaged: remove {path} to continue from the checkpoint before it")
    return (path / SETTINGS).read_text(encoding="utf-8")


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Reads a checkpoint, after `verify` unless verified. Tensors of a sliced one are read from disk at each access."""
    if not verified:
        manifest.verify(path)
    state = _state(path)
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


def _state(path: Path) -> dict[str, Any]:
    try:
        if manifest.entry(path / _STATE) == manifest.read(path)[_STATE]:
            return json.loads((path / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / _STATE} cannot be read ({error})") from error
    raise DataError(f"{path / _STATE} is damaged: remove {path} to continue from the checkpoint before it")


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


def _other_files(folder: Path, state_slice: StateSlice) -> dict[str, Entry]:
    """Waits for the files of the other ranks and returns their manifest entries; OSError when a rank fails or hangs."""
    entries: dict[str, Entry] = {}
    deadline = time.monotonic() + _PATIENCE_S
    for rank in range(1, state_slice.world):
        name = replace(state_slice, rank=rank).file
        mark = folder / f"{name}{_DONE}"
        # Listed, because a network disk may remember for a minute that a single file was missing.
        while mark.name not in os.listdir(folder):
            if time.monotonic() > deadline:
                raise OSError(f"rank {rank} has not written its file within {_PATIENCE_S / 60:.0f} min")
            time.sleep(0.05)
        listed = json.loads(mark.read_text())
        if "error" in listed:
            raise OSError(f"rank {rank}: {listed['error']}")
        entries[name] = Entry(**listed)
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


def _temporary(folder: Path, checkpoint: Checkpoint) -> Path:
    return folder / f"step-{checkpoint.step:06d}.tmp-{checkpoint.name}"


def _prune(folder: Path, keep: int, protected: int | None) -> None:
    """Removes old checkpoints. What cannot be removed, as on a network disk where somebody reads it, stays: the new
    checkpoint is committed, and a later prune tries again."""
    for old in committed(folder)[:-keep]:
        if step_of(old) != protected:
            try:
                # Without its manifest it no longer counts, even if only some of its files can be removed.
                (old / manifest.NAME).unlink()
                shutil.rmtree(old)
            except OSError as error:
                print(
                    f"ltx-train: {old} could not be removed ({error}); trying again at the next save", file=sys.stderr
                )
