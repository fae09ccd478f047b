"""Trackers: what they get, how they continue, and what happens when a server refuses or is not there."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from ltx_train import config
from ltx_train.assembly import trackers
from ltx_train.contracts import Clip, UserError
from ltx_train.sampling.media import Sound, write_mp4
from ltx_train.training.tracking import sinks
from ltx_train.training.tracking.metrics import Metrics


class Refusing(BaseHTTPRequestHandler):
    """Answers as W&B does to a key it does not know."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b'{"errors":[{"message":"permission denied"}]}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def start(folder: Path, url: str, key: str, monkeypatch: pytest.MonkeyPatch) -> sinks.WandB:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", key)
    wandb.teardown()
    return sinks.WandB(folder, "online", "p", {"a": 1}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["a" * 40, "short"])
def test_a_refused_key_is_one_clear_line(
    key: str, refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="W&B does not accept the API key") as error:
        start(tmp_path / "e/main", refusing, key, monkeypatch)
    assert "\n" not in str(error.value)
    wandb.teardown()


@pytest.mark.slow
def test_a_dead_server_costs_seconds_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "e/main"
    # W&B's own limit is 90 s.
    began = time.monotonic()
    tracker = start(folder, "http://127.0.0.1:9", "a" * 40, monkeypatch)
    assert time.monotonic() - began < 45
    assert "recording offline" in capsys.readouterr().err
    began = time.monotonic()
    for step in range(50):
        tracker.write(step, {"train/loss": 1.0})
    assert time.monotonic() - began < 20
    tracker.close()
    wandb.teardown()
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.fixture
def busy() -> Iterator[None]:
    """Four times as many busy processes as processors."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * len(os.sched_getaffinity(0)))
    ]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_record_is_whole_when_its_tracker_is_closed_on_a_loaded_machine(tmp_path: Path, busy: None) -> None:
    tracker = sinks.WandB(tmp_path / "e" / "main", "offline", "p", {"a": 1}, 0)
    for step in range(1, 101):
        tracker.write(step, {"train/loss": 1.0})
    tracker.close()
    (file,) = tmp_path.glob("e/main/wandb/offline-run-*/*.wandb")
    kinds = list(records(file))
    assert kinds.count("history") == 100
    assert kinds[-1] in ("exit", "footer")


def records(file: Path) -> Iterator[str]:
    """The kinds of the records in W&B's file, a LevelDB log behind seven bytes: parts of records in blocks of 32 KiB,
    each with 7 bytes of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # too little for a header: the block is filled up
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts).WhichOneof("record_type")
            parts = b""


@pytest.mark.slow
def test_offline_runs_take_reports_and_clips(tmp_path: Path) -> None:
    """Page and clip are in the run's files. Two runs of one name have ids of their own, and a restart keeps its own."""
    page, clip = tmp_path / "report.html", tmp_path / "clip.mp4"
    page.write_text("<p>hello</p>")
    clip.write_bytes(b"not really a film")
    ids: list[str] = []
    for place, first_step in (("here", 0), ("there", 0), ("here", 5)):
        tracker = sinks.WandB(tmp_path / place / "e/main", "offline", "p", {"a": 1}, first_step)
        ids.append(tracker._run.id)
        tracker.write(first_step + 1, {"val/loss": 1.0})
        tracker.media(first_step + 1, Clip("a caption", clip, "prompts/01"))
        tracker.page(page)
        tracker.close()
    assert ids[0] == ids[2] != ids[1]
    files = [p.name for p in (tmp_path / "here/e/main/wandb").rglob("*") if p.is_file()]
    assert any(name.endswith(".html") for name in files)
    assert any(name.endswith(".mp4") for name in files)


def test_csv_gains_columns_and_continues(tmp_path: Path) -> None:
    for first, rows in ((0, {1: {"a": 1.0}, 2: {"a": 2.0, "b": 3.0}, 3: {"a": 9.0}}), (2, {3: {"a": 4.0, "c": 5.0}})):
        metrics = Metrics(tmp_path, first, [sinks.Csv(tmp_path)])
        for step, values in rows.items():
            metrics.write(step, values)
        metrics.close()
    with (tmp_path / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found] == ["1", "2", "3"]
    assert found[1] == {"step": "2", "a": "2.0", "b": "3.0", "c": ""}
    assert found[2]["c"] == "5.0"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = sinks.TensorBoard(tmp_path, 0)
    for step in (1, 2):
        tracker.write(step, {"val/loss": step / 4})
    clip = tmp_path / "clip.mp4"
    sound = Sound(0.1 * torch.ones(2, 4800), 48000)
    write_mp4(clip, torch.zeros(9, 32, 64, 3, dtype=torch.uint8), sound, 25.0)
    tracker.media(2, Clip("a caption", clip, "prompts/01"))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(1, 0.25), (2, 0.5)]
    (shown,), (heard,) = events.Images("samples/prompts/01"), events.Audio("samples/prompts/01/sound")
    assert (shown.step, shown.width, shown.height, shown.encoded_image_string[:6]) == (2, 64, 32, b"GIF89a")
    with av.open(io.BytesIO(shown.encoded_image_string)) as container:
        assert len(list(container.decode(video=0))) == 5, "every second picture"
    with wave.open(io.BytesIO(heard.encoded_audio_string)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes() > 4000) == (48000, 2, True)


def test_logger_also_selects_the_sinks(tmp_path: Path) -> None:
    made = config.compose_config(["logger=local", "logger.also=[csv,tensorboard]", "data.root=x", "data.source=y"])
    found = trackers.sinks(made, tmp_path, 0)
    assert [type(sink).__name__ for sink in found] == ["Csv", "TensorBoard"]
    for sink in found:
        sink.close()
    system = trackers._system()
    assert json.dumps(system)
    assert system["torch"]
    with pytest.raises(config.ConfigError, match=r"logger\.also='tensorbord'.*did you mean 'tensorboard'"):
        config.compose_config(["logger.also=[tensorbord]", "data.root=x", "data.source=y"])
