"""The speed of reading: every sample is read once, and a damaged one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ltx_train.data import index
from tests.conftest import command, settings


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_of_reading(workers: int, prepared: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    more = ("bench.what=data", f"data.workers={workers}", f"bench.out={out}", "bench.case=disk")
    assert command("bench", *settings(prepared, clips), *more) == 0
    record = json.loads(out.read_text())[0]
    samples = index.load(prepared).records
    assert (record["case"], record["samples"], record["workers"]) == ("disk", len(samples), workers)
    size = sum(sample.tensors.size for sample in samples) / len(samples) / 1e6
    assert record["sample_mb"] == pytest.approx(size, abs=1e-3)
    assert record["plain_mb_s"] > 0
    assert record["ratio"] == pytest.approx(record["samples_mb_s"] / record["plain_mb_s"], rel=0.05, abs=2e-3)


def test_damage_and_stores_are_refused(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    for shard in (tmp_path / "data" / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    assert command("bench", *settings(tmp_path / "data", clips), "bench.what=data") == 78
    assert "do not match the index" in capsys.readouterr().err
    assert command("bench", *settings(prepared, clips), "bench.what=data", "data.root=s3://bucket/data") == 77
    assert "on this machine" in capsys.readouterr().err
