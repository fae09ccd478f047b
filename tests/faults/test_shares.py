"""Updates shared out over ranks (ZeRO): the curve of one process, saved whole, continued by any number in any way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltx_train.training import checkpointing
from ltx_train.training.tracking import read_rows
from tests.conftest import command
from tests.faults.harness import ranks, started, steps_done, wait_for
from tests.faults.test_ranks import end, fit
from tests.faults.test_resume import curve, newest

pytestmark = pytest.mark.slow
FULL = ("adapter=full", "memory=none", "memory.keep=inputs", "optim.clip=0.05", "memory.stream_slots=2")


def on(strategy: str, devices: int = 2) -> tuple[str, ...]:
    return (f"strategy={strategy}", f"strategy.devices={devices}")


def run(root: Path) -> Path:
    return root / "audio_reference/main"


def rows(root: Path) -> list[dict[str, Any]]:
    return read_rows(run(root) / "metrics.jsonl")


def weights(root: Path) -> dict[str, torch.Tensor]:
    return dict(checkpointing.load(newest(run(root))).weights)


def assert_near(first: Path, other: Path) -> None:
    """Losses within 1e-5; gaps are small differences of losses, and their intervals differences of those."""
    for row, same in zip(rows(first), rows(other), strict=True):
        for name in (n for n in row if n.startswith(("train/loss", "val/")) and n in same):
            near = 1e-5 if "loss" in name else 1e-3
            assert same[name] == pytest.approx(row[name], rel=near, abs=1e-6), (row["step"], name)


def test_a_full_fine_tune_in_shares_gives_the_curve_of_one_process(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """20 steps of ZeRO 1, 2 and 3 on two ranks, held-out losses included; and a run that goes from way to way."""
    log, steps = tmp_path / "log", "optim.steps=20"
    assert command(*fit(prepared, clips, tmp_path / "single", *FULL, steps)) == 0
    for name in ("zero1", "zero2", "zero3"):
        assert end(fit(prepared, clips, tmp_path / name, *FULL, steps, *on(name)), log) == 0
        assert_near(tmp_path / "single", tmp_path / name)
    changing = fit(prepared, clips, tmp_path / "changing", *FULL, "checkpoint.interval=100")
    for last, way in ((5, on("zero3")), (9, ()), (13, on("zero2", 1)), (17, on("zero3", 3)), (20, on("zero1"))):
        more = ("optim.global_batch=6", "run.allow=[optim.global_batch]") if "strategy.devices=3" in way else ()
        assert end([*changing, *way, *more, f"optim.steps={last}"], log) == 0, log.read_text()
        if not more:
            continue
        break
    losses = [row["train/loss"] for row in rows(tmp_path / "single")]
    assert [row["train/loss"] for row in rows(tmp_path / "changing")][:13] == pytest.approx(losses[:13], rel=1e-5)
    shared, alone = weights(tmp_path / "zero3"), weights(tmp_path / "single")
    assert shared.keys() == alone.keys()
    assert all(torch.allclose(shared[n], alone[n], rtol=1e-3, atol=1e-4) for n in alone)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_stopped_full_fine_tune_goes_on_bit_for_bit(name: str, prepared: Path, clips: Path, tmp_path: Path) -> None:
    """50 steps in bfloat16 with float32 masters, stopped twice by a signal to one rank."""
    more = (*FULL, "model.dtype=bfloat16", "optim.steps=50", "eval.interval=25", *on(name))
    arguments, log = fit(prepared, clips, tmp_path / "broken", *more), tmp_path / "log"
    for number, first in ((signal.SIGTERM, 5), (signal.SIGUSR1, 25)):
        with started(arguments, log) as process:
            wait_for(lambda: steps_done(run(tmp_path / "broken")) > first, process)  # noqa: B023
            os.kill(ranks(process.pid)[1], number)
            assert process.wait(60) == 75
    assert end(arguments, log) == 0
    assert end(fit(prepared, clips, tmp_path / "whole", *more), log) == 0
    assert curve(run(tmp_path / "broken")) == curve(run(tmp_path / "whole"))
    first, second = newest(run(tmp_path / "broken")), newest(run(tmp_path / "whole"))
    for number in range(2):
        file = f"shard-{number:05d}-of-00002.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()
    masters = load_file(first / "shard-00000-of-00002.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_an_adapter_in_shares_is_saved_as_one_process_saves_it(
    name: str, prepared: Path, clips: Path, tmp_path: Path
) -> None:
    more, log = ("optim.steps=20", "adapter.dropout=0.1", "adapter.ema=0.9"), tmp_path / "log"
    assert command(*fit(prepared, clips, tmp_path / "single", *more)) == 0
    assert end(fit(prepared, clips, tmp_path / "shares", *more, *on(name)), log) == 0
    assert_near(tmp_path / "single", tmp_path / "shares")
    for last, way in ((8, on(name)), (14, on("ddp")), (20, on(name))):
        arguments = fit(prepared, clips, tmp_path / "changing", *more, *way, f"optim.steps={last}")
        assert end(arguments, log) == 0, log.read_text()
    folders = [newest(run(tmp_path / n)) for n in ("single", "shares", "changing")]
    for file in ("weights.safetensors", "optimizer.safetensors", "average.safetensors"):
        one, *others = (load_file(folder / file) for folder in folders)
        for other in others:
            assert other.keys() == one.keys()
            assert all(float((other[n] - one[n]).norm()) <= 1e-3 * float(one[n].norm()) + 1e-6 for n in one)
