"""`watch`: a run's page while it trains, served to this machine alone, read-only."""

from __future__ import annotations

import builtins
import json
import re
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from ltx_train import config as configuration
from ltx_train import durable
from ltx_train.assembly import live_view, run_clips
from ltx_train.assembly.live_view import LiveView, Progress
from ltx_train.config import Config
from ltx_train.contracts import ConfigError
from ltx_train.jobs import watching
from ltx_train.sampling.media import write_mp4
from ltx_train.signals import StopSignal
from tests.browser import dump
from tests.conftest import command

ROW = {"train/loss": 0.5, "perf/step_s": 2.0, "perf/data_wait_s": 0.0, "mem/peak_gib": 21.25, "mem/plan_error": 0.012}


def settings() -> Config:
    return configuration.compose_config(["optim.steps=100", "logger.every=10", "data.buckets=[64x64x33]"])


def logged(folder: Path, *steps: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(durable.line({"step": step, **ROW}) for step in steps))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 20 steps with a clip."""
    run = tmp_path / "e <b>" / "main"
    (run / "samples/prompts/base").mkdir(parents=True)
    (run / "config.yaml").write_text(configuration.dump(settings()))
    logged(run, 10, 20)
    write_mp4(run / "samples/prompts/base/01.mp4", torch.zeros(5, 32, 32, 3, dtype=torch.uint8), None, 25.0)
    listed = {"titles": {"prompts/01": "a <script>alert(1)</script>"}, "columns": {"base": "base"}}
    (run / "samples" / run_clips._LISTED).write_text(json.dumps(listed))
    return run


@pytest.fixture
def server(folder: Path) -> Iterator[ThreadingHTTPServer]:
    with watching.open_server(LiveView(settings(), folder), 0) as opened:
        thread = threading.Thread(target=opened.serve_forever, args=(0.02,))
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def answer(server: ThreadingHTTPServer, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    got = connection.getresponse()
    data = got.read()
    connection.close()
    return got, data


def test_the_page_shows_a_run_and_changes_with_it(server: ThreadingHTTPServer, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    got, page = answer(server, "/")
    assert got.status == 200
    assert "script" not in (got.headers["Content-Security-Policy"] or ""), "scripts of this server alone"
    text = page.decode()
    assert "step 20 of 100" in text
    assert "0:02:40 left" in text
    assert "peak 21.2 GiB, +1.2 % against the plan" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    logged(folder, 10, 20, 30)
    parts = json.loads(answer(server, "/parts.json")[1])
    assert set(parts) == {"progress", "clips", "results"}
    assert "step 30 of 100" in parts["progress"]
    assert before.keys() == dict.fromkeys(folder.rglob("*"), 0).keys(), "nothing is written"


def test_a_player_gets_the_part_of_a_clip_that_it_wants(server: ThreadingHTTPServer, folder: Path) -> None:
    whole = (folder / "samples/prompts/base/01.mp4").read_bytes()
    url = json.loads(answer(server, "/parts.json")[1])["clips"].partition('src="')[2].partition('"')[0]
    assert answer(server, url)[1] == whole
    for asked, wanted in (("bytes=10-19", whole[10:20]), ("bytes=-4", whole[-4:]), ("bytes=5-", whole[5:])):
        got, data = answer(server, url, Range=asked)
        assert (got.status, data) == (206, wanted)
    assert answer(server, url, Range=f"bytes={len(whole)}-")[0].status == 416
    assert answer(server, url, "HEAD")[1] == b""


@pytest.mark.parametrize(
    "path", ["/clips/../../config.yaml", "/clips/0/%2e%2e/config.yaml", "/config.yaml", "//etc/passwd", "/report.html"]
)
def test_nothing_else_is_served(path: str, server: ThreadingHTTPServer) -> None:
    assert answer(server, path)[0].status == 404


def test_other_sites_and_other_methods_are_refused(server: ThreadingHTTPServer) -> None:
    """A page of another site reaches this machine's ports under its own name (DNS rebinding)."""
    port = server.server_address[1]
    assert answer(server, "/", Host=f"evil.example:{port}")[0].status == 403
    assert answer(server, "/", Host=f"localhost:{port}")[0].status == 200
    assert answer(server, "/", "POST")[0].status == 501
    with pytest.raises(ConfigError, match=rf"watch.port={port} cannot be used .*give another"):
        watching.open_server(LiveView(settings(), Path()), port)


def test_a_silent_run_is_named(folder: Path) -> None:
    now = (folder / "metrics.jsonl").stat().st_mtime
    assert not live_view.progress(settings(), folder, now + 79).silent
    late = live_view.progress(settings(), folder, now + 81)
    assert late.silent
    assert late.lines[-1] == "A row was due every 20 s: the run measures, saves, hangs or has stopped."
    logged(folder, 100)
    assert not live_view.progress(settings(), folder, time.time() + 9999).silent, "it is complete"


def test_a_run_without_anything_has_a_page(tmp_path: Path) -> None:
    page = LiveView(settings(), tmp_path).page()
    assert "no step is logged yet" in page


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("watch", f"run.root={tmp_path}") == 77
    assert "is no run's folder" in capsys.readouterr().err


def test_ctrl_c_ends_it_from_its_first_line_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal that comes with the first line, and one while it serves."""

    def stopped(*_: object, **__: object) -> None:
        raise StopSignal

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", stopped)
    assert command("watch", str(folder), "watch.port=0") == 0
    assert "127.0.0.1" in capsys.readouterr().out
    shown: list[str] = []
    monkeypatch.setattr(builtins, "print", lambda *words, **_: shown.append(words[0]) or len(shown) > 1 or stopped())
    assert command("watch", str(folder), "watch.port=0") == 0
    assert len(shown) == 2


def test_a_browser_keeps_the_page_up_to_date(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its script runs under the page's policy and replaces what has changed; players stay the same elements."""
    calls: list[int] = []

    def progress(*_: object) -> Progress:
        calls.append(1)
        return Progress(step=len(calls), steps=100, left_s=None, lines=[], silent=False)

    monkeypatch.setattr(live_view, "progress", progress)
    shown = dump(f"http://127.0.0.1:{server.server_address[1]}/", tmp_path)
    assert len(calls) >= 3, "the page, and the script again and again"
    assert "step 1 of 100" not in shown
    assert re.search(r"step \d+ of 100", shown)
    assert shown.count("<video") == 1
    assert 'id="lost" class="verdict" hidden=""' in shown
