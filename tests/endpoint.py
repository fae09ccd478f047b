"""An OpenAI-compatible endpoint of this process, for captions."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.served import answering


class Model:
    """`answers` are status codes, or texts of the model, taken one after the other; then it describes."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.requests.append((dict(self.headers), body))
                answer = model.answers.pop(0) if model.answers else f"clip {len(model.requests)}"
                code, content = (answer, {"error": "no"}) if isinstance(answer, int) else (200, answer)
                if isinstance(content, str):
                    content = {"choices": [{"message": {"content": content}}]}
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextmanager
def serving() -> Generator[Model]:
    """The endpoint, while it answers."""
    served = Model()
    with answering(served.server):
        yield served
