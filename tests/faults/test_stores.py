"""A run's mirror in an S3-compatible store that refuses, stalls, cuts connections and answers 500."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="the extra s3 is not installed")

from ltx_train.config import compose_config
from ltx_train.contracts import StoreError
from ltx_train.jobs import supervisor
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.mirror import RunStore
from tests.faults.object_store import Way, object_store
from tests.faults.test_resume import newest
from tests.faults.test_supervise import saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
FAULTS = ("refuse", "stall", "cut", "error")


@pytest.fixture(scope="module")
def store() -> Generator[tuple[str, Way]]:
    with object_store() as (url, way):
        yield url, way


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_holds_no_half_checkpoint_and_is_used_again(
    fault: str, store: tuple[str, Way], tmp_path: Path
) -> None:
    """Uploads and downloads raise StoreError while it fails. Then the same objects continue: what is fetched is what
    was saved."""
    url, way = store[0] + f"/{fault}", store[1]
    here, there = tmp_path / "a" / "exp" / "main", tmp_path / "b" / "exp" / "main"
    saved(here, 1)
    writes, reads = RunStore(url, here), RunStore(url, there)
    assert writes.push(keep=2) == ["step-000001"]
    saved(here, 2)
    way.fault, way.met = fault, 0
    try:
        with pytest.raises(StoreError, match="could not be written"):
            writes.push(keep=2)
        with pytest.raises(StoreError, match="could not be read"):
            reads.pull()
    finally:
        way.fault = ""
    assert way.met > 1
    assert not list(there.rglob("*"))[2:], "nothing but the folder for checkpoints"
    assert reads.pull() == "step-000001"
    assert writes.push(keep=2) == ["step-000002"]
    assert reads.pull() == "step-000002"
    assert float(commit.load(newest(there)).weights["w"][0]) == 2


@pytest.mark.parametrize("part", ["weights.safetensors", "optimizer.safetensors"])
def test_a_transfer_that_is_cut_anywhere_does_not_count(
    part: str, store: tuple[str, Way], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is cut from one file of the checkpoint on, while sending it and while fetching it."""
    url, way = store[0] + f"/cut-{part}", store[1]
    here, there = tmp_path / "a" / "exp" / "main", tmp_path / "b" / "exp" / "main"
    saved(here, 1)
    writes, reads = RunStore(url, here), RunStore(url, there)

    def cut_from(method: str, position: int) -> None:
        whole = getattr(writes._system, method)

        def transfer(*arguments: str, **named: object) -> object:
            if arguments[position].endswith(part):
                way.fault = "cut"
            return whole(*arguments, **named)

        for one in (writes, reads):
            monkeypatch.setattr(one._system, method, transfer)

    cut_from("put_file", 1)
    with pytest.raises(StoreError):
        writes.push(keep=2)
    way.fault = ""
    monkeypatch.undo()
    assert reads.pull() is None
    assert writes.push(keep=2) == ["step-000001"]
    cut_from("get_file", 0)
    with pytest.raises(StoreError):
        reads.pull()
    way.fault = ""
    monkeypatch.undo()
    assert commit.committed(there / "checkpoints") == []
    assert reads.pull() == "step-000001"


def test_supervise_gives_up_a_silent_store_on_the_second_ctrl_c_and_uploads_when_it_answers(
    store: tuple[str, Way], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, way = store[0] + "/silent", store[1]
    main = threading.main_thread().ident
    assert main is not None

    def run_ends_and_the_store_is_silent(*_: object) -> int:
        way.fault, way.met = "stall", 0
        interrupts.start()
        return 0

    def ctrl_c_twice() -> None:
        while way.met == 0:
            time.sleep(0.01)
        for _ in range(2):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.3)

    interrupts = threading.Thread(target=ctrl_c_twice)
    monkeypatch.setattr(supervisor, "_restarting", run_ends_and_the_store_is_silent)
    settings = ["supervise.backoff_s=30", f"supervise.store={url}", f"run.root={tmp_path}", "run.experiment=exp"]
    made = compose_config(settings)
    saved(tmp_path / "exp" / "main", 1)
    try:
        assert supervisor.supervise(made) == 74
    finally:
        way.fault = ""
        interrupts.join()
    assert "on this machine alone" in capsys.readouterr().err
    monkeypatch.setattr(supervisor, "_restarting", lambda *_: 0)
    assert supervisor.supervise(made) == 0
    assert RunStore(url, tmp_path / "b" / "exp" / "main").pull() == "step-000001"
