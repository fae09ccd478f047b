"""A prepared folder in an object store, read through a folder on this machine that holds a part of it.

Owns the transfers: whole files, tried again when they fail or stall, compared with the index before they count, and
removed when the folder outgrows its limit. The folder has the layout of a prepared folder; `store.json` in it names the
store. Processes of a machine share the folder: each file is fetched by one of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx_train import durable, rng
from ltx_train.contracts import DataError, StoreError
from ltx_train.data import index as indexes
from ltx_train.data.files import SHARDS, Files, LocalFiles, UnusableShardError
from ltx_train.data.index import INDEX_NAME, Index

NAME = "store.json"
_INCOMING, _LOCKS, _UNUSABLE = "incoming", "locks", "unusable"
# Tries of a transfer, and the pause after the first that failed; it doubles, and half of it is random.
_TRIES, _PAUSE_S = 6, 0.5
# A transfer whose folder is so old has no process any more.
_ABANDONED_S = 86400.0
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """url: any URL of fsspec. limit_gib: size of the shards that are kept here. stall_s: a transfer that brings nothing
    for so long is given up and tried again."""

    url: str
    limit_gib: float
    stall_s: float = 60.0


def is_url(root: str) -> bool:
    return "://" in root


def mirror(settings: StoreSettings, cache: Path) -> Path:
    """The folder on this machine for a store, with its present index. StoreError, DataError.

    Shards that were damaged in the store are tried again from here on: they may have been copied anew.
    """
    folder = cache / hashlib.sha256(settings.url.rstrip("/").encode()).hexdigest()[:16]
    for name in (SHARDS, _INCOMING, _LOCKS, _UNUSABLE):
        (folder / name).mkdir(parents=True, exist_ok=True)
    durable.write(folder / NAME, json.dumps(asdict(settings)) + "\n")
    with _locked(folder, INDEX_NAME):
        _tidy(folder)
        _Transfer(folder, settings).bring(INDEX_NAME, lambda path: bool(indexes.load(path.parent).shards))
    return folder


def _tidy(folder: Path) -> None:
    """Removes marks of damage, and what killed processes left half transferred."""
    for mark in (folder / _UNUSABLE).iterdir():
        mark.unlink(missing_ok=True)
    for left in (folder / _INCOMING).iterdir():
        status = _status(left)
        if status is not None and time.time() - status.st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def settings_of(root: Path) -> StoreSettings | None:
    """The store behind a folder; None for a folder that is whole. DataError when its store.json is damaged."""
    path = root / NAME
    if not path.is_file():
        return None
    try:
        return StoreSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove {root}, which is a cache") from error


def files_of(root: Path, index: Index) -> Files:
    """The files of a folder: a store's where the folder has a store.json, else its own."""
    kept = settings_of(root)
    return LocalFiles(root) if kept is None else StoreFiles(root, kept, index)


class StoreFiles:
    """Files of a store, as `data.files.Files` describes them. It may be used after a fork."""

    def __init__(self, folder: Path, settings: StoreSettings, index: Index) -> None:
        self._folder, self._limit = folder, settings.limit_gib * _GIB
        self._transfer = _Transfer(folder, settings)
        self._shards = {f"{SHARDS}/{shard.name}": shard for shard in index.shards}

    def path(self, name: str) -> Path:
        target = self._folder / name
        with suppress(FileNotFoundError):
            os.utime(target)  # the file that nobody used for the longest time is removed first
            return target
        if (self._folder / _UNUSABLE / target.name).exists():
            raise UnusableShardError(f"{self._transfer.url}/{name} is damaged there")
        with _locked(self._folder, name):
            if not target.is_file():
                self._fetch(name)
        return target

    def place(self, name: str) -> Path:
        return self._folder / name

    def forget(self, name: str) -> bool:
        (self._folder / name).unlink(missing_ok=True)
        return True

    def unusable(self) -> frozenset[str]:
        return frozenset(path.name for path in (self._folder / _UNUSABLE).iterdir())

    def _fetch(self, name: str) -> None:
        shard = self._shards[name]
        self._make_room(shard.size)
        try:
            self._transfer.bring(name, lambda path: path.stat().st_size == shard.size and _sha256(path) == shard.sha256)
        except DataError as error:
            durable.write(self._folder / _UNUSABLE / shard.name, "")
            print(f"ltx-train: {error}: its {shard.count} samples are left out", file=sys.stderr)
            raise UnusableShardError(str(error)) from error

    def _make_room(self, size: int) -> None:
        """Removes shards, the longest unused first. Readers keep what they have open; others fetch it again."""
        with _locked(self._folder, SHARDS):
            found = [(path, _status(path)) for path in (self._folder / SHARDS).iterdir()]
            kept = [(path, status) for path, status in found if status is not None]
            total = sum(status.st_size for _, status in kept)
            for path, status in sorted(kept, key=lambda entry: entry[1].st_mtime_ns):
                if total + size <= self._limit:
                    return
                path.unlink(missing_ok=True)
                total -= status.st_size


class _Transfer:
    """Brings single files from a store into its folder."""

    def __init__(self, folder: Path, settings: StoreSettings) -> None:
        self._folder, self.url, self._stall_s = folder, settings.url.rstrip("/"), settings.stall_s
        # The clients of stores do not survive a fork: each process opens its own.
        self._opened: tuple[int, Any, str] | None = None

    def bring(self, name: str, is_right: Callable[[Path], bool]) -> None:
        """Places a file whose content is right. DataError when it is wrong twice; StoreError when it cannot be read.

        `is_right` gets a file of its final name in a folder of its own; DataError there means no.
        """
        # Of this process and thread: a file that a killed process left half there is never taken for a whole one.
        folder = self._folder / _INCOMING / f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        folder.mkdir()
        try:
            for _ in range(2):
                arrived = self._copy_patiently(name, folder)
                if _holds(is_right, arrived):
                    os.replace(arrived, self._folder / name)
                    return
            raise DataError(f"{self.url}/{name} is damaged there: two transfers brought bytes that do not match")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _copy_patiently(self, name: str, folder: Path) -> Path:
        """The copy, in a folder of its own inside `folder`: one that was given up may still be written to."""
        for attempt in range(_TRIES):
            target = folder / str(time.monotonic_ns()) / Path(name).name
            target.parent.mkdir()
            try:
                self._copy(name, target)
                return target
            except DataError:
                raise
            except FileNotFoundError as error:
                raise StoreError(
                    f"{self.url}/{name} does not exist: is data.root right, and all of it copied?"
                ) from error
            except Exception as error:  # clouds' libraries raise what they like
                self._opened = None
                if attempt == _TRIES - 1:
                    raise StoreError(
                        f"{self.url}/{name} could not be read ({type(error).__name__}: {error}), {_TRIES} times"
                    ) from error
                shutil.rmtree(target.parent, ignore_errors=True)
                jitter = float(rng.uniform(os.getpid(), "store/pause", name, attempt))
                time.sleep(_PAUSE_S * 2**attempt * (0.5 + jitter / 2))
        raise AssertionError("the last try returns or raises")

    def _copy(self, name: str, target: Path) -> None:
        """One try. TimeoutError when nothing arrives for stall_s; the thread that waits for it is left behind."""
        system, base = self._system()
        failed: list[BaseException] = []

        def copy() -> None:
            try:
                system.get_file(f"{base}/{name}", str(target))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=copy, name="store", daemon=True)
        thread.start()
        size, since = -1, time.monotonic()
        while thread.is_alive():
            thread.join(0.05)
            now = target.stat().st_size if target.is_file() else -1
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > self._stall_s:
                raise TimeoutError(f"nothing arrived for {self._stall_s:g} s")
        if failed:
            raise failed[0]

    def _system(self) -> tuple[Any, str]:
        import fsspec

        if self._opened is None or self._opened[0] != os.getpid():
            try:
                system, base = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise DataError(f"data.root={self.url}: {error}") from error
            self._opened = (os.getpid(), system, base)
        return self._opened[1], self._opened[2]


@contextmanager
def _locked(folder: Path, name: str) -> Generator[None]:
    """One process of this machine at a time. The kernel releases the lock however the process ends."""
    handle = os.open(folder / _LOCKS / name.replace("/", "-"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _status(path: Path) -> os.stat_result | None:
    """None for a file that another process has removed meanwhile."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _holds(is_right: Callable[[Path], bool], path: Path) -> bool:
    try:
        return is_right(path)
    except (DataError, OSError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
