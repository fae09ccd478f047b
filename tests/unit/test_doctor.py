from __future__ import annotations

import json
import re
from collections import namedtuple
from pathlib import Path

import pytest

from ltx_train.assembly.memory_plan import Room
from ltx_train.commands import doctor
from ltx_train.memory.planning.cards import card_by_name
from tests.conftest import TINY, command


def findings(capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 0) -> dict[str, dict[str, str]]:
    assert command("doctor", "doctor.json=true", *overrides) == code
    return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_every_finding_that_is_no_pass_has_a_fix(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "experiment=audio_reference", f"data.root={prepared}", f"model.path={TINY}")
    assert {"libraries", "gpu", "host memory", "weights", "data", "disk space", "disk speed"} <= found.keys()
    assert all(f["fix"] for f in found.values() if f["level"] != "pass")
    assert found["weights"]["level"] == "pass"
    assert "MB/s written and flushed" in found["disk speed"]["text"]


def test_missing_weights_and_data_are_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "experiment=voice_reference_22b", f"data.root={tmp_path / 'none'}")
    assert found["weights"]["fix"] == "give the single-file checkpoint"
    assert found["data"]["fix"] == "ltx-train prepare"
    assert command("doctor", "experiment=voice_reference_22b") == 0
    assert "-> give the single-file checkpoint" in capsys.readouterr().out


def test_a_full_disk_is_a_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 10**6))
    found = findings(capsys, "experiment=voice_reference_22b", code=77)
    assert found["disk space"]["level"] == "fail"
    assert "checkpoint.keep" in found["disk space"]["fix"]


def test_saves_that_take_longer_than_training_to_the_next_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor.memory_plan, "here", lambda _config: Room(card=card_by_name("H200"), budget_gib=300.0, host_gib=None)
    )
    fixes: list[str] = []
    for speed in (1e6, 30e6, 1e9):
        monkeypatch.setattr(doctor, "_write_speed", lambda *_, speed=speed: speed)
        fixes.append(findings(capsys, "experiment=voice_reference_22b")["disk speed"].get("fix", ""))
    slow = re.match(r"training would wait for every save: checkpoint.interval=(\d+) or more", fixes[0])
    assert slow is not None
    assert 1000 < int(slow[1]) < 2500  # 1736 s of saving over the planned 1.2 s a step
    assert fixes[1:] == ["a notice of 30 s is too short for it: what counts is checkpoint.interval", ""]


def test_damaged_weights_are_a_finding_not_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    found = findings(capsys, f"model.path={tmp_path / 'broken.safetensors'}", code=77)
    assert found["weights"]["level"] == "fail"
