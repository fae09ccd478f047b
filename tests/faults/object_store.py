"""An S3-compatible server (moto), and a way to it that fails as networks and stores do."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import boto3
import fsspec
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

BUCKET = "runs"
_ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
KEYS = {"key": "test", "secret": "test"}
# A busy machine answers within seconds; a silent store costs twice that.
_WAITS = {"connect_timeout": 3, "read_timeout": 3, "retries": {"max_attempts": 1}}


@dataclass
class Way:
    """A TCP relay. fault: "" passes everything; refuse, stall, cut and error are how connections fail from now on,
    established ones included. after: bytes of the response that pass before `cut`."""

    target: tuple[str, int]
    fault: str = ""
    after: int = 200
    # Connections that met the fault.
    met: int = 0
    _listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(connection,), daemon=True).start()

    def close(self) -> None:
        # A thread that waits in accept() wakes up only by shutdown.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _relay(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(self.target) as server:
            back = threading.Thread(target=self._answers, args=(server, client), daemon=True)
            back.start()
            while data := client.recv(65536):
                if self.fault:
                    self.met += 1
                if self.fault == "refuse":
                    return
                if self.fault == "error":
                    client.sendall(_ERROR)
                    return
                if self.fault != "stall":
                    server.sendall(data)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if self.fault == "cut":
                    client.sendall(data[: self.after])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


@contextmanager
def object_store() -> Generator[tuple[str, Way]]:
    """A store's URL and the way to it. fsspec is configured as a user does it, with short times to wait."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    way = Way((host, port))
    thread = threading.Thread(target=way.serve)
    thread.start()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", aws_access_key_id=KEYS["key"],
        aws_secret_access_key=KEYS["secret"],
    )  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    client.close()
    before, retries = dict(fsspec.config.conf), S3FileSystem.retries
    S3FileSystem.retries = 2
    fsspec.config.conf["s3"] = {**KEYS, "endpoint_url": way.url, "config_kwargs": _WAITS}
    try:
        yield f"s3://{BUCKET}/team", way
    finally:
        fsspec.config.conf.clear()
        fsspec.config.conf.update(before)
        S3FileSystem.retries = retries
        way.close()
        thread.join()
        server.stop()
