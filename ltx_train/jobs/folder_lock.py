"""An advisory lock: only one process writes to a folder. The kernel releases it however the process ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from ltx_train.contracts import UserError


class FolderLock:
    """A context manager. FolderInUseError names the holder's host and process when the folder is in use."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._handle = -1

    def __enter__(self) -> FolderLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._handle, 200).decode(errors="replace").strip() or "another process"
            os.close(self._handle)
            mend = "wait for it, or choose another folder (run.id=..., data.root=...)"
            raise FolderInUseError(f"{self._path.parent} is in use by {holder}: {mend}") from error
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"{socket.gethostname()} pid {os.getpid()}".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)


class FolderInUseError(UserError):
    """Another process uses the folder."""
