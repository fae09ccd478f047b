"""The part of the hub's interface that an upload needs, on this machine: repositories, commits and large files."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from tests.served import answering

_SHA = "0" * 40


class Hub:
    """files: content by path, of each repository. status: an error that is answered to every request, if not 0."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, Any] = {}
        self.tokens: set[str] = set()
        self.status = 0
        self._large: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and content: bytes, or an object for JSON."""
        if self.status:
            return self.status, {"error": "no"}
        if method == "PUT":
            self._large[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")
            return 200, {"errors": [] if len(front) > 2 and yaml.safe_load(front[1]) else ["no front"], "warnings": []}
        match = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+)(?:/(.*))?$", path)
        if match is None or match[1] not in self.files:
            return 404, {"error": "Repository not found"}
        return self._of_repository(match[1], match[2] or "", body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.url}/{name}"}
        if name in self.files:
            return 409, url
        self.created[name], self.files[name] = asked, {}
        return 200, url

    def _of_repository(self, name: str, rest: str, body: bytes) -> tuple[int, Any]:
        files = self.files[name]
        if rest.startswith("preupload/"):
            kinds = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": kinds}
        if rest.startswith("commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = self._large[entry["value"]["oid"]]
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{_SHA}", "commitOid": _SHA, "success": True}
        if rest.startswith("resolve/"):
            return 200, files[rest.split("/", 2)[2]]
        if rest.startswith("tree/"):
            return 200, [{"type": "file", "path": p, "size": len(d), "oid": _SHA} for p, d in files.items()]
        return 200, {"id": name, "sha": _SHA, "siblings": [{"rfilename": path} for path in files]}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, content = hub.answer(self.command, self.path.partition("?")[0], body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{_SHA}"')
            self.send_header("X-Repo-Commit", _SHA)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _do  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    return Handler


@contextmanager
def serving() -> Generator[Hub]:
    """The hub, while it answers."""
    hub = Hub()
    with answering(hub.server):
        yield hub
