"""Mirrors a run's folder to an object store, so that another machine can continue the run.

Owns the order of transfers. The manifest of a checkpoint is uploaded last, so that a partial upload does not count.
A downloaded checkpoint is compared with its manifest before it counts. Nothing that the store holds is trusted: names
are plain names inside the run's folder.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from ltx_train.contracts import DataError, StoreError
from ltx_train.training.checkpoints import commit, manifest

_CHECKPOINTS = "checkpoints"
# Files that another machine needs to continue the run, besides checkpoints.
_FILES = ("config.yaml", "metrics.jsonl", "heldout.jsonl", "wandb_id")
_NAME = re.compile(r"step-\d+")


class RunStore:
    """The run's folder in an object store. url: the store, any URL of fsspec (s3://, gs://, file://).

    Methods raise StoreError whatever the store's library raises: those of clouds derive from Exception alone.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._folder, self._url = folder, url
        self._base = f"{url.rstrip('/')}/{folder.parent.name}/{folder.name}"
        # Names of stored checkpoints whose bytes did not match when they were fetched.
        self._damaged: set[str] = set()
        try:
            system, self._root = fsspec.core.url_to_fs(self._base)
        except (ImportError, ValueError) as error:
            raise DataError(f"supervise.store={url}: {error}") from error
        self._system: Any = system

    def push(self, keep: int) -> list[str]:
        """Uploads committed checkpoints that the store lacks or holds damaged, then metrics and adapters. Returns the
        uploaded names.

        Afterwards removes older checkpoints beyond `keep` from the store, except the local ones and the best one.
        """
        with self._transfer("written"):
            local = commit.committed(self._folder / _CHECKPOINTS)
            stored, uploaded = set(self._committed()), list[str]()
            for path in reversed(local):  # the newest first: this machine may be gone before the others are sent
                if path.name not in stored or path.name in self._damaged or not self._is_same(path):
                    self._send(path)
                    self._damaged.discard(path.name)
                    uploaded.append(path.name)
            self._send_files()
            retained = {path.name for path in local} | _best(local)
            for name in [n for n in self._committed()[:-keep] if n not in retained]:
                self._system.rm(f"{self._root}/{_CHECKPOINTS}/{name}", recursive=True)
        return sorted(uploaded)

    def pull(self) -> str | None:
        """Downloads the newest complete checkpoint if it is newer than the local ones. Returns its name, or None.

        DataError when the store has checkpoints, all are damaged, and there is no local one: starting over in their
        place needs the user's consent.
        """
        local = commit.committed(self._folder / _CHECKPOINTS)
        with self._transfer("read"):
            names = self._committed()
            for name in reversed(names):
                if local and int(name.removeprefix("step-")) <= commit.step_of(local[-1]):
                    return None
                if self._fetch(name):
                    return name
                self._damaged.add(name)
                print(f"ltx-train: {name} in {self._url} is damaged: passed over", file=sys.stderr)
        if names and not local:
            raise DataError(f"every checkpoint in {self._base} is damaged: remove them there to start over at step 0")
        return None

    @contextmanager
    def _transfer(self, done: str) -> Generator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise StoreError(f"{self._url} could not be {done} ({type(error).__name__}: {error})") from error

    def _committed(self) -> list[str]:
        """Names of the stored checkpoints that have a manifest, sorted by step."""
        self._system.invalidate_cache()
        manifests = self._system.glob(f"{self._root}/{_CHECKPOINTS}/step-*/{manifest.NAME}")
        names = [path.rsplit("/", 2)[-2] for path in manifests]
        return sorted(filter(_NAME.fullmatch, names), key=lambda name: int(name.removeprefix("step-")))

    def _is_same(self, path: Path) -> bool:
        """Whether the stored manifest is the local one and every file has its size."""
        source = f"{self._root}/{_CHECKPOINTS}/{path.name}"
        if self._system.cat_file(f"{source}/{manifest.NAME}") != (path / manifest.NAME).read_bytes():
            return False
        sizes = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in self._system.ls(source, detail=True)}
        return all(sizes.get(name) == item.size for name, item in manifest.read(path).items())

    def _send(self, path: Path) -> None:
        target = f"{self._root}/{_CHECKPOINTS}/{path.name}"
        if self._system.exists(f"{target}/{manifest.NAME}"):
            # While its files are replaced, the checkpoint must not count.
            self._system.rm(f"{target}/{manifest.NAME}")
        for part in sorted(path.iterdir(), key=lambda p: p.name == manifest.NAME):
            self._put(part, f"{target}/{part.name}")

    def _send_files(self) -> None:
        for name in _FILES:
            if (self._folder / name).is_file():
                self._put(self._folder / name, f"{self._root}/{name}")
        for path in (self._folder / "adapters").glob("step-*.safetensors"):
            target = f"{self._root}/adapters/{path.name}"
            if not self._system.exists(target) or self._system.size(target) != path.stat().st_size:
                self._put(path, target)

    def _put(self, path: Path, target: str) -> None:
        self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._system.put_file(str(path), target)

    def _fetch(self, name: str) -> bool:
        """Downloads a checkpoint and the run's files. Returns False when the checkpoint does not match its manifest. A
        transfer that fails is an error and says nothing about the checkpoint."""
        final = self._folder / _CHECKPOINTS / name
        temporary = final.with_name(f"{name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            source = f"{self._root}/{_CHECKPOINTS}/{name}"
            listed = self._system.cat_file(f"{source}/{manifest.NAME}")
            for part in manifest.parse(listed, f"{source}/{manifest.NAME}"):
                if not self._system.exists(f"{source}/{part}"):
                    raise DataError(f"{source}/{part} is missing")
                self._system.get_file(f"{source}/{part}", str(temporary / part))
            (temporary / manifest.NAME).write_bytes(listed)
            manifest.verify(temporary)
            self._get_files()
            if final.exists():
                shutil.rmtree(final)  # a local one of this name is not complete, or it would not be fetched
            temporary.rename(final)
        except DataError:
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _get_files(self) -> None:
        """Whole or not at all: a transfer may be cut."""
        for name in _FILES:
            if self._system.exists(f"{self._root}/{name}"):
                partial = self._folder / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
                try:
                    self._system.get_file(f"{self._root}/{name}", str(partial))
                    os.replace(partial, self._folder / name)
                finally:
                    partial.unlink(missing_ok=True)


def _best(local: Sequence[Path]) -> set[str]:
    """Name of the best checkpoint by the notes of the newest local one. Another machine may have written it."""
    step = commit.notes(local[-1]).get("selection", {}).get("step") if local else None
    return set() if step is None else {f"step-{step:06d}"}
