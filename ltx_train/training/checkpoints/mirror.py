"""Mirrors a run's folder to an object store, so that another machine can continue the run.

Owns the order of transfers. The manifest of a checkpoint is uploaded last, so that a partial upload does not count.
A downloaded checkpoint is compared with its manifest before it counts.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from ltx_train.contracts import DataError
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import MANIFEST

_CHECKPOINTS = "checkpoints"
# Files that another machine needs to continue the run, besides checkpoints.
_FILES = ("config.yaml", "metrics.jsonl", "heldout.jsonl")


class RunStore:
    """The run's folder in an object store. url: the store, any URL of fsspec (s3://, gs://, file://)."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self._base = f"{url.rstrip('/')}/{folder.parent.name}/{folder.name}"
        try:
            system, self._root = fsspec.core.url_to_fs(self._base)
        except (ImportError, ValueError) as error:
            raise DataError(f"supervise.store={url}: {error}") from error
        self._system: Any = system

    def push(self, keep: int) -> list[str]:
        """Uploads committed checkpoints that the store lacks, then metrics and adapters. Returns the uploaded names.

        Afterwards removes older checkpoints beyond `keep` from the store, except the local ones and the best one.
        """
        stored = set(self._committed())
        local = commit.committed(self._folder / _CHECKPOINTS)
        uploaded: list[str] = []
        for path in local:
            if path.name not in stored:
                self._send(path)
                uploaded.append(path.name)
        for name in _FILES:
            if (self._folder / name).is_file():
                self._put(self._folder / name, f"{self._root}/{name}")
        for path in (self._folder / "adapters").glob("step-*.safetensors"):
            target = f"{self._root}/adapters/{path.name}"
            if not self._system.exists(target):
                self._put(path, target)
        retained = {path.name for path in local} | _best(local)
        for name in [n for n in self._committed()[:-keep] if n not in retained]:
            self._system.rm(f"{self._root}/{_CHECKPOINTS}/{name}", recursive=True)
        return uploaded

    def pull(self) -> str | None:
        """Downloads the newest complete checkpoint if it is newer than the local ones. Returns its name, or None."""
        local = commit.committed(self._folder / _CHECKPOINTS)
        for name in reversed(self._committed()):
            if local and name <= local[-1].name:
                return None
            if self._fetch(name):
                return name
        return None

    def _committed(self) -> list[str]:
        """Names of the stored checkpoints that have a manifest, sorted by step."""
        self._system.invalidate_cache()
        manifests = self._system.glob(f"{self._root}/{_CHECKPOINTS}/step-*/{MANIFEST}")
        return sorted(path.rsplit("/", 2)[-2] for path in manifests)

    def _send(self, path: Path) -> None:
        target = f"{self._root}/{_CHECKPOINTS}/{path.name}"
        parts = sorted(path.iterdir(), key=lambda p: p.name == MANIFEST)
        for part in parts:
            self._put(part, f"{target}/{part.name}")

    def _put(self, path: Path, target: str) -> None:
        self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._system.put_file(str(path), target)

    def _fetch(self, name: str) -> bool:
        """Downloads a checkpoint and the run's files. Returns False when the checkpoint does not match its manifest."""
        final = self._folder / _CHECKPOINTS / name
        temporary = final.with_name(f"{name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            source = f"{self._root}/{_CHECKPOINTS}/{name}"
            manifest = json.loads(self._system.cat_file(f"{source}/{MANIFEST}"))
            for part in (*manifest["files"], MANIFEST):
                self._system.get_file(f"{source}/{part}", str(temporary / part))
            commit.verify(temporary)
            for other in _FILES:
                if self._system.exists(f"{self._root}/{other}"):
                    self._system.get_file(f"{self._root}/{other}", str(self._folder / other))
            temporary.rename(final)
        except (OSError, ValueError, KeyError, DataError):
            shutil.rmtree(temporary, ignore_errors=True)
            return False
        return True


def _best(local: Sequence[Path]) -> set[str]:
    """Name of the best checkpoint by the notes of the newest local one. Another machine may have written it."""
    step = commit.notes(local[-1]).get("selection", {}).get("step") if local else None
    return set() if step is None else {f"step-{step:06d}"}
