"""A run on machines that go away: notices, restarts, an object store, and the same curve in the end."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import register_implementation
from safetensors.torch import load_file

from ltx_train import signals
from ltx_train.config import Config, compose_config
from ltx_train.contracts import DataError, StoreError
from ltx_train.jobs import notices, processes, supervisor
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.checkpoints.mirror import RunStore
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import command
from tests.faults.entries import hung, waiting
from tests.faults.harness import children, started, steps_done, wait_for
from tests.faults.test_resume import curve, fit, newest


class Cloud:
    """A metadata service of either cloud that announces the end while `leaving` is true."""

    def __init__(self) -> None:
        self.leaving, self.asked = False, 0
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._answer(200 if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else 400, "token")

            def do_GET(self) -> None:
                cloud.asked += 1
                if self.path.endswith("/instance/preempted"):
                    known = self.headers.get("Metadata-Flavor") == "Google"
                    self._answer(200 if known else 403, "TRUE" if cloud.leaving else "FALSE")
                elif self.headers.get("X-aws-ec2-metadata-token") != "token":
                    self._answer(401, "")
                elif cloud.leaving:
                    self._answer(200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
                else:
                    self._answer(404, "")

            def _answer(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def cloud() -> Generator[Cloud]:
    made = Cloud()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_notices_of_both_clouds(cloud: Cloud) -> None:
    asking = [notices.source(name, cloud.url) for name in ("aws", "gcp", "none")]
    assert [ask() for ask in asking] == [False, False, False]
    cloud.leaving = True
    assert [ask() for ask in asking] == [True, True, False]
    assert not notices.aws("http://127.0.0.1:9")
    assert not notices.gcp("http://127.0.0.1:9")


def saved(folder: Path, step: int, **notes: Any) -> None:
    made = Checkpoint(
        step=step,
        weights={"w": torch.full((9,), float(step))},
        optimizer={"state": {}, "param_groups": []},
        notes=notes,
    )
    commit.save(folder / "checkpoints", made, keep=9)


def test_only_whole_checkpoints_travel(tmp_path: Path) -> None:
    """What is half sent or damaged in the store does not count; the one before it does."""
    here, there = tmp_path / "a" / "exp" / "main", tmp_path / "b" / "exp" / "main"
    store = f"file://{tmp_path / 'store'}"
    assert RunStore(store, there).pull() is None
    for step in (1, 2, 3):
        saved(here, step)
    (here / "metrics.jsonl").write_text('{"step": 1}\n')
    assert RunStore(store, here).push(keep=2) == ["step-000001", "step-000002", "step-000003"]
    assert RunStore(store, here).push(keep=2) == []
    shutil.rmtree(here / "checkpoints" / "step-000001")
    assert RunStore(store, here).push(keep=2) == []
    remote = tmp_path / "store" / "exp" / "main" / "checkpoints"
    assert sorted(p.name for p in remote.iterdir()) == ["step-000002", "step-000003"]
    (remote / "step-000009").mkdir()
    (remote / "step-000009" / "weights.safetensors").write_bytes(b"half")
    damaged = bytearray((remote / "step-000003" / "weights.safetensors").read_bytes())
    damaged[-1] ^= 1
    (remote / "step-000003" / "weights.safetensors").write_bytes(damaged)
    assert RunStore(store, there).pull() == "step-000002"
    assert RunStore(store, there).pull() is None
    assert float(commit.load(newest(there)).weights["w"][0]) == 2
    assert (there / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not list(there.rglob("*.tmp-*"))


def test_the_best_checkpoint_stays_in_the_store(tmp_path: Path) -> None:
    """Whoever made it: the newest notes name it. Adapters travel by step, the link to the best does not."""
    here = tmp_path / "a" / "exp" / "main"
    store = f"file://{tmp_path / 'store'}"
    for step in (1, 2, 3, 4):
        saved(here, step, selection={"step": 1})
    (here / "adapters").mkdir()
    (here / "adapters" / "step-000001.safetensors").write_bytes(b"x")
    (here / "adapters" / "best.safetensors").symlink_to("step-000001.safetensors")
    (here / "heldout.jsonl").write_text("{}\n")
    RunStore(store, here).push(keep=2)
    for step in (1, 2):
        shutil.rmtree(here / "checkpoints" / f"step-{step:06d}")
    RunStore(store, here).push(keep=2)
    remote = tmp_path / "store" / "exp" / "main"
    assert sorted(p.name for p in (remote / "checkpoints").iterdir()) == ["step-000001", "step-000003", "step-000004"]
    assert [p.name for p in (remote / "adapters").iterdir()] == ["step-000001.safetensors"]
    assert (remote / "heldout.jsonl").is_file()


def test_a_damaged_checkpoint_in_the_store_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped byte and a missing file: found when another machine fetches, replaced by its own save of that step."""
    store, here, there = (
        f"file://{tmp_path / 'store'}",
        tmp_path / "a" / "exp" / "main",
        tmp_path / "b" / "exp" / "main",
    )
    for step in (1, 2, 3):
        saved(here, step)
    RunStore(store, here).push(keep=9)
    remote = tmp_path / "store" / "exp" / "main" / "checkpoints"
    weights = remote / "step-000003" / "weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (remote / "step-000002" / "optimizer.safetensors").unlink()
    mirror = RunStore(store, there)
    assert mirror.pull() == "step-000001"
    assert capsys.readouterr().err.count("is damaged: passed over") == 2
    for step in (2, 3):
        saved(there, step)
    assert mirror.push(keep=9) == ["step-000002", "step-000003"]
    assert weights.read_bytes() == good
    assert mirror.push(keep=9) == []
    for path in remote.glob("step-*/weights.safetensors"):
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match="to start over at step 0"):
        RunStore(store, tmp_path / "c" / "exp" / "main").pull()


def test_a_store_cannot_write_outside_the_run(tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "exp" / "main", tmp_path / "b" / "exp" / "main"
    store = f"file://{tmp_path / 'store'}"
    saved(here, 1)
    RunStore(store, here).push(keep=9)
    path = tmp_path / "store" / "exp" / "main" / "checkpoints" / "step-000001" / "manifest.json"
    raw = json.loads(path.read_text())
    raw["files"]["../../../../../bashrc"] = {"size": 4, "sha256": "0"}
    del raw["sha256"]
    path.write_text(json.dumps(raw))
    (tmp_path / "bashrc").write_text("evil")
    with pytest.raises(DataError, match="is damaged"):
        RunStore(store, there).pull()
    assert [p.name for p in tmp_path.rglob("bashrc")] == ["bashrc"]


class BrokenStore(LocalFileSystem):
    """Raises what libraries of clouds raise, which is no OSError."""

    protocol = "broken"
    left = 0

    def put_file(self, *arguments: Any, **named: Any) -> None:
        if type(self).left > 0:
            type(self).left -= 1
            raise RuntimeError("the token has expired")
        super().put_file(*arguments, **named)


@pytest.mark.parametrize(("failures", "code"), [(3, 0), (99, 74)])
def test_the_last_upload_is_repeated_and_its_failure_has_a_code(
    failures: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_implementation("broken", BrokenStore, clobber=True)
    monkeypatch.setattr(BrokenStore, "left", failures)
    monkeypatch.setattr(supervisor, "_restarting", lambda *_: 0)
    settings = ["supervise.backoff_s=0.01", f"supervise.store=broken://{tmp_path / 'store'}", f"run.root={tmp_path}"]
    made = compose_config([*settings, "run.experiment=exp"])
    saved(tmp_path / "exp" / "main", 1)
    assert supervisor.supervise(made) == code
    shown = capsys.readouterr().err
    assert "RuntimeError: the token has expired" in shown
    assert ("on this machine alone" in shown) == (code == 74)


def test_a_store_that_cannot_be_read_does_not_start_the_run_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_restarting", lambda *_: 0)
    settings = ["supervise.backoff_s=0.01", "supervise.store=http://127.0.0.1:9/x", f"run.root={tmp_path}"]
    made = compose_config([*settings, "run.experiment=exp"])
    with pytest.raises(StoreError, match="could not be read"):
        supervisor.supervise(made)


@pytest.mark.slow
def test_a_machine_that_is_taken_away_is_continued_on_another(
    cloud: Cloud, prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """Two machines: two folders and one store. Nothing is lost after a notice (test_notices_of_both_clouds)."""

    def supervised(machine: str) -> list[str]:
        common = ["supervise.notice=gcp", f"supervise.notice_url={cloud.url}", "supervise.poll_s=0.5"]
        return ["supervise", *fit(prepared, clips, tmp_path / machine, "checkpoint.interval=4", *common)[1:],
                f"supervise.store=file://{tmp_path / 'store'}"]  # fmt: skip

    first, second = (tmp_path / m / "audio_reference" / "main" for m in ("first", "second"))
    with started(supervised("first"), tmp_path / "log") as process:
        wait_for(lambda: steps_done(first) > 5, process)
        cloud.leaving = True
        assert process.wait() == 75
    assert "this machine is being taken away" in (tmp_path / "log").read_text()
    cloud.leaving, done = False, steps_done(first)
    with started(supervised("second"), tmp_path / "log") as process:
        assert process.wait() == 0
    assert f"fetched step-{done:06d}" in (tmp_path / "log").read_text()
    assert command(*fit(prepared, clips, tmp_path / "whole")) == 0
    whole = tmp_path / "whole" / "audio_reference" / "main"
    assert curve(second) == curve(whole)
    assert _same(newest(second), newest(whole))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.6, 1.2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_run_starts_is_a_preemption(
    number: signal.Signals, delay: float, prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """The supervised process has just been started, or imports, or builds the model."""
    arguments = ["supervise", *fit(prepared, clips, tmp_path, "optim.steps=400", "eval.interval=0")[1:]]
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: bool(children(process.pid)), process)
        time.sleep(delay)
        process.send_signal(number)
        assert process.wait() == 75
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.STOP)
def test_no_signal_is_lost_while_a_process_starts(number: signal.Signals) -> None:
    """Sent as soon as there is a process, before it is a program of its own: it ends like a later one."""
    child = processes.spawn(waiting, compose_config([]), {})
    os.kill(child.pid, number)
    child.join(60)
    assert processes.shell_code(child.exitcode) == 75
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint(signals.STOP), "this process takes them again"


@pytest.mark.slow
def test_three_starts_that_save_nothing_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    original = supervisor.processes.spawn

    def counted(entry: Any, config: Config, environment: Any) -> Any:
        starts.append(time.monotonic())
        return original(hung, config, environment)

    monkeypatch.setattr(supervisor.processes, "spawn", counted)
    made = compose_config([f"run.root={tmp_path}", "supervise.backoff_s=0.1"])
    assert supervisor.supervise(made) == 76
    assert len(starts) == 3


@pytest.mark.slow
def test_a_crash_is_restarted(prepared: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "audio_reference" / "main"
    arguments = fit(prepared, clips, tmp_path, "checkpoint.interval=2", "supervise.backoff_s=0.1", "optim.steps=20")
    with started(["supervise", *arguments[1:]], tmp_path / "log") as process:
        wait_for(lambda: steps_done(run) > 4, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait() == 0
    assert "fit ended with 137; again in" in (tmp_path / "log").read_text()
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["run/restarts"] == 1


@pytest.mark.slow
def test_chaos(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """60 steps, 9 ends at random: asked to stop, killed, out of disk. The curve is an unbroken one's, bit for bit."""
    chance = random.Random(5)
    steps = (
        "optim.steps=60",
        "eval.interval=30",
        "eval.max_samples=2",
        "checkpoint.interval=4",
        "checkpoint.on_full=stop",
        "optim.schedule=constant",
    )
    broken = fit(prepared, clips, tmp_path / "broken", *steps)
    run = tmp_path / "broken" / "audio_reference" / "main"
    ends: list[int] = []
    for number in range(9):
        harm = ("stop", "kill", "disk")[number % 3]
        goal = 6 * (number + 1) + chance.randrange(3)
        with started(broken, tmp_path / "log") as process:
            wait_for(lambda: steps_done(run) >= goal, process)  # noqa: B023
            time.sleep(chance.random() * 0.3)
            if harm == "disk":
                whole = commit.committed(run / "checkpoints")[-1]
                size = max(p.stat().st_size for p in whole.iterdir())
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
            else:
                process.send_signal(signal.SIGTERM if harm == "stop" else signal.SIGKILL)
            ends.append(process.wait())
    # -15: asked to stop before the interpreter has come to our code.
    assert {75, -9, 78} <= set(ends) <= {75, -9, 78, -15}
    assert command(*broken) == 0
    assert command(*fit(prepared, clips, tmp_path / "whole", *steps)) == 0
    whole = tmp_path / "whole" / "audio_reference" / "main"
    assert len(curve(run)) == 60
    assert curve(run) == curve(whole)
    assert _same(newest(run), newest(whole))


def _same(first: Path, second: Path) -> bool:
    """Weights and moments of two checkpoints."""
    for name in ("weights.safetensors", "optimizer.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            return False
    return True
