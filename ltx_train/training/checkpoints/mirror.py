"""A run's folder mirrored to an object store, so that another machine can go on with it.

Owns the order of transfers: a checkpoint's manifest goes last, so that a half upload does not count, and
what is fetched is compared with its manifest before it counts here.
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
# What a run needs besides its checkpoints to be the same run elsewhere.
_FILES = ("config.yaml", "metrics.jsonl", "heldout.jsonl")


class RunStore:
    """`url` is anything fsspec knows (s3://, gs://, file://); the run is a folder in it."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self._base = f"{url.rstrip('/')}/{folder.parent.name}/{folder.name}"
        try:
            system, self._root = fsspec.core.url_to_fs(self._base)
        except (ImportError, ValueError) as error:
            raise DataError(f"supervise.store={url}: {error}") from error
        self._system: Any = system

    def push(self, keep: int) -> list[str]:
        """Uploads committed checkpoints that are not there yet, then metrics; returns their names.

        Older ones beyond `keep` are removed afterwards, but for what is kept here and the best one.
        """
        there = set(self._committed())
        here = commit.committed(self._folder / _CHECKPOINTS)
        sent: list[str] = []
        for path in here:
            if path.name not in there:
                self._send(path)
                sent.append(path.name)
        for name in _FILES:
            if (self._folder / name).is_file():
                self._put(self._folder / name, f"{self._root}/{name}")
        for path in (self._folder / "adapters").glob("step-*.safetensors"):
            target = f"{self._root}/adapters/{path.name}"
            if not self._system.exists(target):
                self._put(path, target)
        wanted = {path.name for path in here} | _best(here)
        for name in [n for n in self._committed()[:-keep] if n not in wanted]:
            self._system.rm(f"{self._root}/{_CHECKPOINTS}/{name}", recursive=True)
        return sent

    def pull(self) -> str | None:
        """Fetches the newest whole checkpoint if it is newer than what is here; its name, or None."""
        here = commit.committed(self._folder / _CHECKPOINTS)
        for name in reversed(self._committed()):
            if here and name <= here[-1].name:
                return None
            if self._fetch(name):
                return name
        return None

    def _committed(self) -> list[str]:
        """Names of checkpoints whose manifest is there, by step."""
        self._system.invalidate_cache()
        found = self._system.glob(f"{self._root}/{_CHECKPOINTS}/step-*/{MANIFEST}")
        return sorted(path.rsplit("/", 2)[-2] for path in found)

    def _send(self, path: Path) -> None:
        target = f"{self._root}/{_CHECKPOINTS}/{path.name}"
        parts = sorted(path.iterdir(), key=lambda p: p.name == MANIFEST)
        for part in parts:
            self._put(part, f"{target}/{part.name}")

    def _put(self, path: Path, target: str) -> None:
        self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._system.put_file(str(path), target)

    def _fetch(self, name: str) -> bool:
        """False when what came is not what its manifest says."""
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


def _best(here: Sequence[Path]) -> set[str]:
    """The name of the best checkpoint as far as the newest one here knows; it may have been made elsewhere."""
    step = commit.notes(here[-1]).get("selection", {}).get("step") if here else None
    return set() if step is None else {f"step-{step:06d}"}
