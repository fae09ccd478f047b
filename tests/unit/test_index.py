"""The index of a prepared folder: what is written is read, damage is found, and a million samples are not too many."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ltx_train.contracts import DataError
from ltx_train.data import index
from ltx_train.data.columns import Columns, Rows
from ltx_train.data.index import Index, Shard
from ltx_train.data.record import Member, Record

MILLION = 1_000_000


def record(number: int, **changes: object) -> Record:
    made = Record(
        key=f"clip_{number}", split="heldout" if number % 5 == 0 else "train", speaker=f"Żaneta {number % 3}",
        recording=f"take {number}", start=0.5 * number, weight=1.0, caption="one\nline", bucket="64x64x33", fps=25.0,
        source_fps=29.97, averaged="", seconds=1.32, context="c", has_audio=True, voice=number % 2 == 0,
        own_reference=False, rms_db=-20.0, source="x.mp4", source_sha256=f"{number:064x}", item=f"i{number}",
        measured={} if number % 2 else {"lufs": -14.0 + number, "peak_db": 0.0}, variants=("v",) * (number % 3),
        shard="train-0.tar", tensors=Member(512 * number, 100, f"{number:064x}"),
        contexts=(Member(0, 10, "a"), *(Member(9, 11, "b"),) * (number % 3)),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def made(*records: Record) -> Index:
    shards = (Shard("train-0.tar", 10240, "0" * 64, len(records)),)
    return Index(
        settings={"fps": 25, "buckets": ["64x64x33"]}, encoders={"video VAE": "1"}, shards=shards,
        records=Rows.of(records), quarantined={"bad": "no sound"},
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_is_written_is_read(count: int, tmp_path: Path) -> None:
    records = [record(number) for number in range(count)]
    index.save(made(*records), tmp_path)
    found = index.load(tmp_path)
    assert found == made(*records)
    assert list(found.records) == records
    assert [r.key for r in found.split("heldout")] == [r.key for r in records if r.split == "heldout"]
    first = (tmp_path / index.INDEX_NAME).read_bytes()
    index.save(found, tmp_path)
    assert (tmp_path / index.INDEX_NAME).read_bytes() == first


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    index.save(made(record(0), record(1)), tmp_path)
    path = tmp_path / index.INDEX_NAME
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(DataError, match=r"is damaged|another release"):
            index.load(tmp_path)
    for length in range(0, len(data), 101):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="is damaged"):
            index.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"key": "a\x1b[2Jb"}, r"a\x1b[2Jb"), ({"speaker": "x\ny"}, r"x\ny"), ({"shard": "../secret"}, "../secret"),
        ({"source": "\u202eevil"}, r"\u202eevil"), ({"recording": "\x00"}, r"\x00"),
    ],
)  # fmt: skip
def test_names_that_would_reach_a_terminal_or_a_path_are_refused(
    changes: dict[str, str], shown: str, tmp_path: Path
) -> None:
    index.save(made(record(0, **changes)), tmp_path)
    with pytest.raises(DataError) as raised:
        list(index.load(tmp_path).records)
    assert shown in str(raised.value)


@pytest.mark.parametrize("name", ["../x.tar", "a\x1b.tar"])
def test_a_shard_is_a_plain_file(name: str, tmp_path: Path) -> None:
    index.save(replace(made(record(0)), shards=(Shard(name, 1, "0", 1),)), tmp_path)
    with pytest.raises(DataError, match="is damaged"):
        index.load(tmp_path)


@pytest.mark.parametrize("column", ["key.codes", "key.ends", "speaker.data", "fps", "members.rows", "variants.rows"])
def test_columns_that_do_not_fit_each_other_are_refused(column: str) -> None:
    arrays = dict(Columns.of([record(0), record(1), record(2)]).arrays)
    arrays[column] = np.concatenate([arrays[column], arrays[column][-1:] + 5])
    with pytest.raises(ValueError, match=r"texts|lengths"):
        Columns(arrays)


def test_an_old_index_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="run `ltx-train prepare`"):
        index.load(tmp_path)


def test_groups_keep_their_order() -> None:
    rows = Rows.of([record(number, seconds=1.32 + 0.001 * (number % 2)) for number in range(9)])
    groups = rows.grouped("speaker")
    assert {name: [r.key for r in group] for name, group in groups.items()} == {
        f"Żaneta {who}": [f"clip_{number}" for number in range(9) if number % 3 == who] for who in range(3)
    }
    assert {name: len(group) for name, group in rows.by_shape().items()} == {"64x64x33+33": 9}
    assert list(rows.shaped_like(0)) == [True] * 9
    assert [r.key for r in rows.only(rows.like("speaker", 1))] == ["clip_1", "clip_4", "clip_7"]
    assert list(rows.by_key()) == [f"clip_{number}" for number in range(9)]
    assert rows.by_key()["clip_4"] == rows[4]


def _million(root: Path) -> None:
    """An index of a million samples, each with its own recording, caption of 80 characters, file and bytes."""
    few = Columns.of([record(0), record(3)]).arrays
    arrays = {name: few[name] if name.endswith((".ends", ".data")) else np.resize(few[name], MILLION) for name in few}
    widths = {"key": 16, "recording": 16, "caption": 80, "item": 32, "source_sha256": 64, "members.sha256": 64}
    for name, width in widths.items():
        arrays[f"{name}.codes"] = np.arange(MILLION, dtype=np.uint32)
        arrays[f"{name}.ends"] = np.arange(1, MILLION + 1) * width
        arrays[f"{name}.data"] = np.resize(np.frombuffer(b"0123456789abcdefg", np.uint8), MILLION * width)
    arrays["members.rows"], arrays["variants.rows"] = np.arange(1, MILLION + 1), np.zeros(MILLION, np.int64)
    arrays["variants.codes"] = arrays["variants.codes"][:0]
    index.save(replace(made(record(0)), records=Rows(Columns(arrays))), root)


_OPEN = """
import sys, time
from ltx_train.data import index

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

before, started = resident_mib(), time.process_time()
found = index.load(sys.argv[1])
print(len(found.records), time.process_time() - started, resident_mib() - before)
"""


@pytest.mark.slow
def test_a_million_samples_open_in_three_seconds_and_half_a_gigabyte(tmp_path: Path) -> None:
    """In processor seconds, on an idle machine or a busy one."""
    _million(tmp_path)
    opened = subprocess.run(
        [sys.executable, "-c", _OPEN, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.split()
    count, seconds, mib = int(opened[0]), float(opened[1]), float(opened[2])
    print(f"{seconds:.2f} s, {mib:.0f} MiB, {(tmp_path / index.INDEX_NAME).stat().st_size / 1e6:.0f} MB on disk")
    assert count == MILLION
    assert seconds < 3
    assert mib < 500
