"""A server of one run's live page on this machine alone: it answers GET, and changes nothing.

Owns HTTP: addresses, byte ranges for players, and headers. A page of another site cannot read it: requests under any
other name than this machine's own are refused.
"""

from __future__ import annotations

import json
import re
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ltx_train.assembly.live_view import CLIPS, LiveView
from ltx_train.contracts import ConfigError

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_TYPES = {".mp4": "video/mp4", ".jpg": "image/jpeg"}
_SCRIPT = Path(__file__).parents[1] / "pages" / "templates" / "watch.js"
_POLICY = "default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; frame-ancestors 'none'"


def open_server(view: LiveView, port: int) -> ThreadingHTTPServer:
    """A server that is bound and not started. port: 0 for a free one. ConfigError when it is taken."""
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, view))
    except OSError as error:
        raise ConfigError(f"watch.port={port} cannot be used ({error.strerror}): give another, or 0 for any") from error


class _Handler(BaseHTTPRequestHandler):
    server_version = "ltx-train"
    protocol_version = "HTTP/1.1"

    def __init__(self, view: LiveView, *args: Any) -> None:
        self._view = view
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answers the page, its parts, its script and its clips; 404 for all else."""
        if self.headers.get("Host", "").rpartition(":")[0] not in _NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send(self._view.page().encode(), "text/html; charset=utf-8")
        elif self.path == "/parts.json":
            self._send(json.dumps(self._view.parts()).encode(), "application/json")
        elif self.path == "/watch.js":
            self._send(_SCRIPT.read_bytes(), "text/javascript; charset=utf-8")
        elif self.path.startswith(CLIPS) and (path := self._view.file(self.path)) is not None:
            self._send_file(path)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are not printed."""

    def _send(self, data: bytes, kind: str, status: int = HTTPStatus.OK, *, within: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Accept-Ranges", "bytes")
        if within:
            self.send_header("Content-Range", within)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_file(self, path: Path) -> None:
        """A file, or the range of its bytes that the request names."""
        try:
            data = path.read_bytes()
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        if found is None or found.groups() == ("", ""):
            self._send(data, _TYPES[path.suffix])
            return
        first, last = _ends(found[1], found[2], len(data))
        if first > last:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        within = f"bytes {first}-{last}/{len(data)}"
        self._send(data[first : last + 1], _TYPES[path.suffix], HTTPStatus.PARTIAL_CONTENT, within=within)


def _ends(first: str, last: str, size: int) -> tuple[int, int]:
    """The first and last byte of a range; without a first one it counts from the end."""
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last or size - 1), size - 1)
