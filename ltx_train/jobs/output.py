"""Standard output that outlives its reader.

`ltx-train fit ... | head` and a `tee` that was killed close the pipe. A run goes on then: its results are in files.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Descriptor(io.RawIOBase):
    """An open file descriptor. After its reader has gone, it leads to /dev/null."""

    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._number, data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._number)
            return len(data)


def survive_readers() -> None:
    """Replaces stdout and stderr by streams that ignore the end of their reader. Other failed writes stay errors."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            continue
        stream.flush()
        raw = io.BufferedWriter(_Descriptor(stream.fileno()))
        is_prompt = stream.line_buffering or name == "stderr"
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=is_prompt))
