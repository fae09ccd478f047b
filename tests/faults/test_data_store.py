"""Prepared data in a store: the same samples, whatever fails on the way, and damage that is noticed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Generator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch

from ltx_train import rng
from ltx_train.config import changed, folders
from ltx_train.contracts import DataError, Exit, Sample, StoreError
from ltx_train.data import index, store
from ltx_train.data.ahead import FetchAhead
from ltx_train.data.files import UnusableShardError
from ltx_train.data.index import Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader
from ltx_train.data.store import StoreFiles, StoreSettings
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import command, settings
from tests.faults.harness import PATIENCE_S
from tests.faults.object_store import Way, object_store
from tests.faults.test_ranks import fit

GIB = 2**30


@pytest.fixture(scope="module")
def source(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of several small shards."""
    root = tmp_path_factory.mktemp("source") / "data"
    assert command("prepare", *settings(root, clips, "data.samples_per_shard=2")) == 0
    return root


@pytest.fixture(scope="module")
def bucket(source: Path) -> Generator[tuple[str, Way]]:
    with object_store() as (url, way):
        system, base = fsspec.core.url_to_fs(url)
        system.put(str(source), f"{base}/data", recursive=True)
        yield f"{url}/data", way


class _Counting(SimpleHTTPRequestHandler):
    """A server of files that counts what is read."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        _Counting.asked[self.path] += 1
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the library's name
        """Prints nothing."""


@pytest.fixture
def web(source: Path) -> Generator[str]:
    _Counting.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Counting, directory=str(source))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PAUSE_S", 0.1)


def opened(url: str, cache: Path, *, limit_gib: float = 1.0, stall_s: float = 60.0) -> Reader:
    root = store.mirror(StoreSettings(url, limit_gib, stall_s), cache)
    return Reader(root, index.load(root), seed=0)


def assert_same(reader: Reader, source: Path) -> None:
    local = Reader(source, index.load(source), seed=0)
    for key in local.records:
        _assert_equal(reader.sample(Address(key, 0)), local.sample(Address(key, 0)))


def _assert_equal(first: Sample, other: Sample) -> None:
    assert first.key == other.key
    for name in ("video_latent", "audio_latent", "video_context", "audio_context"):
        assert torch.equal(getattr(first, name), getattr(other, name))


def test_a_store_gives_the_samples_of_the_folder(
    source: Path, bucket: tuple[str, Way], web: str, tmp_path: Path
) -> None:
    for url in (f"file://{source}", bucket[0], web):
        assert_same(opened(url, tmp_path / "cache"), source)
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("fault", ["refuse", "error", "cut", "stall"])
def test_what_fails_for_a_while_is_tried_again(
    fault: str, source: Path, bucket: tuple[str, Way], tmp_path: Path
) -> None:
    url, way = bucket
    reader = opened(url, tmp_path, stall_s=1.0)
    way.fault, way.met = fault, 0
    mend = threading.Timer(0.5, lambda: setattr(way, "fault", ""))
    mend.start()
    try:
        assert_same(reader, source)
    finally:
        mend.join()
    assert not list((tmp_path).glob("*/incoming/*"))


def test_a_store_that_never_answers_is_named(
    bucket: tuple[str, Way], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_TRIES", 2)
    url, way = bucket
    root = store.mirror(StoreSettings(url, 1.0), tmp_path)
    files = StoreFiles(root, StoreSettings(url, 1.0, stall_s=0.3), index.load(root))
    way.fault = "stall"
    try:
        with pytest.raises(StoreError, match=r"shards/.*could not be read .*2 times"):
            files.path(f"shards/{_trained(index.load(root))}")
    finally:
        way.fault = ""


def test_what_does_not_exist_is_named_at_once(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        opened(f"file://{source.parent}/other", tmp_path)
    with pytest.raises(DataError, match=r"data\.root=quark://x"):
        opened("quark://x", tmp_path)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "store")
    return tmp_path / "store"


def _trained(prepared: Index) -> str:
    """The name of a training shard."""
    return next(shard.name for shard in prepared.shards if shard.name.startswith("train"))


def test_no_flipped_bit_and_no_cut_of_a_shard_is_used(copy: Path, tmp_path: Path) -> None:
    """200 single bits, and truncations at every 512 bytes."""
    settings_of_store = StoreSettings(f"file://{copy}", 1.0)
    root = store.mirror(settings_of_store, tmp_path / "cache")
    files = StoreFiles(root, settings_of_store, index.load(root))
    name = _trained(index.load(root))
    path, whole = copy / "shards" / name, (copy / "shards" / name).read_bytes()
    places = torch.randint(8 * len(whole), (200,), generator=rng.generator(0, "test/flips")).tolist()
    damaged = [whole[: p // 8] + bytes([whole[p // 8] ^ 1 << p % 8]) + whole[p // 8 + 1 :] for p in places]
    damaged += [whole[:size] for size in range(0, len(whole), 512)]
    assert len(damaged) == 200 + -(-len(whole) // 512)
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UnusableShardError, match="two transfers brought bytes that do not match"):
            files.path(f"shards/{name}")
        assert not (root / "shards" / name).exists()
        (root / "unusable" / name).unlink()
    path.write_bytes(whole)
    assert files.path(f"shards/{name}").read_bytes() == whole


def test_a_new_start_tries_damaged_shards_again_and_removes_what_was_left(copy: Path, tmp_path: Path) -> None:
    kept = StoreSettings(f"file://{copy}", 1.0)
    root = store.mirror(kept, tmp_path / "cache")
    name = _trained(index.load(root))
    whole = (copy / "shards" / name).read_bytes()
    (copy / "shards" / name).write_bytes(b"")
    files = StoreFiles(root, kept, index.load(root))
    for text in ("two transfers", "is damaged there"):
        with pytest.raises(UnusableShardError, match=text):
            files.path(f"shards/{name}")
    assert files.unusable() == {name}
    (copy / "shards" / name).write_bytes(whole)
    (root / "incoming" / "of-yesterday").mkdir()
    os.utime(root / "incoming" / "of-yesterday", (1.0, 1.0))
    (root / "incoming" / "of-now").mkdir()
    store.mirror(kept, tmp_path / "cache")
    assert files.path(f"shards/{name}").read_bytes() == whole
    assert [path.name for path in (root / "incoming").iterdir()] == ["of-now"]


def test_damage_in_the_cache_is_fetched_again(source: Path, tmp_path: Path) -> None:
    reader = opened(f"file://{source}", tmp_path)
    assert_same(reader, source)
    for path in tmp_path.glob("*/*/*"):
        if path.parent.name == "shards":
            data = bytearray(path.read_bytes())
            for place in range(600, len(data), 997):
                data[place] ^= 1
            path.write_bytes(data)
    assert_same(opened(f"file://{source}", tmp_path), source)


def test_a_cache_keeps_its_limit(source: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in (source / "shards").iterdir()]
    assert len(sizes) > 4
    limit = 2.5 * max(sizes)
    reader = opened(f"file://{source}", tmp_path, limit_gib=limit / GIB)
    for _ in range(2):
        assert_same(reader, source)
        assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*/shards/*")) <= limit


def _read_all(url: str, cache: str) -> None:
    reader = opened(url, Path(cache))
    for key in reader.records:
        reader.sample(Address(key, 0))


def test_processes_of_a_machine_fetch_each_file_once(web: str, source: Path, tmp_path: Path) -> None:
    readers = [get_context("fork").Process(target=_read_all, args=(web, str(tmp_path))) for _ in range(3)]
    for process in readers:
        process.start()
    for process in readers:
        process.join()
        assert process.exitcode == 0
    fetched = {name: count for name, count in _Counting.asked.items() if "/shards/" in name}
    assert len(fetched) == len(list((source / "shards").iterdir()))
    assert set(fetched.values()) == {1}


def test_files_are_fetched_before_they_are_needed() -> None:
    """Those of the next batches, and no more of them than a cache may hold."""
    fetched: list[str] = []

    class Noting:
        def path(self, name: str) -> Path:
            fetched.append(name)
            return Path(name)

        def forget(self, name: str) -> bool:
            return False

        def unusable(self) -> frozenset[str]:
            return frozenset()

    batches = [[Address(str(number), number)] for number in range(30)]
    seen: list[list[Address]] = []
    for batch in FetchAhead(batches, Noting(), lambda address: [address.key], most=8):
        seen.append(batch)
        wanted = min(30, len(seen) + 7)
        deadline = time.monotonic() + PATIENCE_S
        while len(fetched) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(fetched, key=int) == [str(number) for number in range(wanted)]
    assert seen == batches


@pytest.mark.parametrize("order", ["shuffled", "stream"])
def test_a_run_reads_a_store_as_it_reads_the_folder(
    order: str, source: Path, bucket: tuple[str, Way], clips: Path, tmp_path: Path
) -> None:
    losses: list[list[float]] = []
    for root in (str(source), bucket[0]):
        arguments = fit(source, clips, tmp_path / Path(root).name / str(len(losses)), f"data.root={root}")
        more = ("optim.steps=3", "data.workers=2", f"data.cache={tmp_path / 'cache'}", "data.samples_per_shard=2")
        assert command(*arguments, *more, f"data.order={order}", "data.shuffle=2") == 0
        run = next(tmp_path.glob(f"*/{len(losses)}/audio_reference/main"))
        losses.append([row["train/loss"] for row in read_rows(run / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_a_run_does_without_as_many_samples_as_it_may(
    copy: Path, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = copy / "shards" / _trained(index.load(copy))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    arguments = fit(copy, clips, tmp_path, f"data.root=file://{copy}", "optim.steps=4", "optim.global_batch=8")
    more = (f"data.cache={tmp_path / 'cache'}", "data.samples_per_shard=2", "run.id={}")
    assert command(*arguments, *[word.format("none") for word in more]) == 78
    assert "data.max_bad_fraction=0: copy these shards to the store again" in capfd.readouterr().err
    assert command(*arguments, *[word.format("some") for word in more], "data.max_bad_fraction=0.5") == 0
    rows = read_rows(tmp_path / "audio_reference/some/metrics.jsonl")
    assert len(rows) == 4


def test_a_url_stands_for_all_settings_of_the_folder(
    source: Path, bucket: tuple[str, Way], web: str, clips: Path, tmp_path: Path
) -> None:
    local = folders.from_folder(str(source), "fit", ["optim.steps=3"])
    for url in (f"file://{source}", f"{bucket[0]}/", web):
        assert folders.from_folder(url, "fit", ["optim.steps=3"]) == changed(local, {"data.root": url})
    more = ("optim.steps=2", "eval.interval=0", "data.workers=0", f"data.cache={tmp_path / 'cache'}")
    assert command("fit", f"file://{source}", f"run.root={tmp_path}", *more) == 0
    assert len(read_rows(tmp_path / "audio_reference/main/metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("file://{copy}/none", Exit.CONFIG, "has no config.yaml: give the URL of a whole prepared folder"),
        ("file://{copy}", Exit.CONFIG, "config.yaml does not match its digest"),
        ("file://{copy}/contexts", Exit.CONFIG, "is no prepared folder"),
        ("http://127.0.0.1:9", Exit.STORE, "http://127.0.0.1:9/config.yaml cannot be read"),
        ("nfs5://server/data", Exit.CONFIG, "nfs5://server/data: Protocol not known"),
    ],
)
def test_a_url_without_readable_settings_is_refused(
    url: str, code: int, message: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "config.yaml"
    shutil.copy(path, copy / "contexts")
    path.write_text(path.read_text().replace("logger", "Logger", 1))
    assert command("fit", url.format(copy=copy), f"run.root={tmp_path / 'runs'}") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_prepare_writes_to_folders_alone(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prepare", *settings(Path("x"), clips), "data.root=s3://bucket/data") == 77
    assert "prepare writes to a folder" in capsys.readouterr().err
