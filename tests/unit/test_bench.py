"""`bench` on the CPU: what a record says, and the plain path beside ours."""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path

import pytest

from ltx_train.commands import bench
from tests.conftest import TINY, command


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_record_holds_ours_and_the_peer(
    quantize: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A spawned process would import everything again.
    monkeypatch.setattr(bench, "get_context", lambda _method: get_context("fork"))
    out = tmp_path / "records.json"
    arguments = (
        "experiment=audio_reference", f"model.path={TINY}", "bench.steps=2", "bench.warmup=1", "bench.case=tiny",
        "bench.baseline=true", f"bench.out={out}", f"memory.quantize={quantize}", "memory.stream_blocks=2",
    )  # fmt: skip
    assert command("bench", *arguments) == 0
    shown = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == [shown]
    assert shown["case"] == "tiny"
    assert shown["recompiled"] == 0
    assert len(shown["losses"]) == 3
    for name in ("step_s_median", "step_s_min", "first_step_s", "tokens_per_s", "host_peak_gib", "peer_step_s_median"):
        assert shown[name] > 0, name
    assert shown["stall_s"] == 0
    assert ("optimum-quanto int8" in shown["peer"]) == (quantize == "int8")


@pytest.mark.parametrize("modes", [("mode.audio=absent",), ("mixture={t2av: 1, t2v: 1}",)])
def test_the_peer_needs_both_modalities(modes: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """In every mode that the run trains on."""
    one = ("mode=t2av", *modes, "adapter.targets=[attn1.to_q]", "bench.baseline=true", "bench.steps=1")
    assert command("bench", f"model.path={TINY}", "data.buckets=[64x64x9]", *one) == 77
    assert "always runs both modalities" in capsys.readouterr().err
