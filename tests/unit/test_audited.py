"""A folder that passed the audit is not read again until it changes; faults that are accepted by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ltx_train import config, durable
from ltx_train.assembly import checked_data
from ltx_train.config import Config
from ltx_train.contracts import DataError
from ltx_train.data import audited
from ltx_train.data.findings import Finding
from tests.conftest import settings

COPIES = Finding(True, "a and b are one recording", ("a", "b"), "copies")


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy that nothing has audited yet."""
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "data" / audited.NAME).unlink(missing_ok=True)
    return tmp_path / "data"


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """How often a folder is audited: each audit appends its findings, here none."""
    return _counted(monkeypatch, [])


def _counted(monkeypatch: pytest.MonkeyPatch, findings: list[Finding]) -> list[Any]:
    made: list[Any] = []

    def audit(*_: object, **_named: object) -> list[Finding]:
        made.append(findings)
        return findings

    monkeypatch.setattr(checked_data, "audit", audit)
    return made


def made(folder: Path, clips: Path, *more: str) -> Config:
    return config.compose_config([*settings(folder, clips), *more])


def test_the_second_start_reads_no_sample(folder: Path, clips: Path, audits: list[Any]) -> None:
    for _ in range(3):
        checked_data.open_checked(made(folder, clips))
    assert len(audits) == 1


def _touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", ["shard", "lost shard", "mode", "memory", "rubbish", "other rubbish"])
def test_any_difference_means_a_new_audit(change: str, folder: Path, clips: Path, audits: list[Any]) -> None:
    checked_data.open_checked(made(folder, clips))
    more: tuple[str, ...] = ()
    if change == "shard":
        _touch(next((folder / "shards").iterdir()))
    elif change == "lost shard":
        next((folder / "shards").iterdir()).unlink()
    elif change == "mode":
        more = ("mode=t2av",)
    elif change == "memory":
        (folder / audited.NAME).unlink()
    else:
        (folder / audited.NAME).write_text("{" if change == "rubbish" else json.dumps({"passed": 7}))
    checked_data.open_checked(made(folder, clips, *more))
    assert len(audits) == 2


def test_a_folder_that_nobody_may_write_to_is_audited_every_time(
    folder: Path, clips: Path, audits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(durable, "write", refuse)
    for _ in range(2):
        checked_data.open_checked(made(folder, clips))
    assert len(audits) == 2


def test_a_fault_is_accepted_by_its_name_alone(folder: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audits = _counted(monkeypatch, [COPIES])
    with pytest.raises(DataError, match=r"one recording\n  to train in spite of it: data\.accept=\[copies\]"):
        checked_data.open_checked(made(folder, clips))
    with pytest.raises(DataError):
        checked_data.open_checked(made(folder, clips, "data.accept=[silent]"))
    for _ in range(2):
        assert checked_data.open_checked(made(folder, clips, "data.accept=[copies]"))[0] == folder
    assert len(audits) == 4  # nothing is remembered of a folder with faults
