"""Updates shared out over ranks (ZeRO): the curve of one process, saved whole, continued by any number in any way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltx_train.training.checkpoints import commit
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import command
from tests.faults.harness import children, started, steps_done, wait_for
from tests.faults.test_ranks import end, fit
from tests.faults.test_resume import curve, newest

pytestmark = pytest.mark.slow
FULL = (
    "adapter=full",
    "memory=none",
    "memory.keep=inputs",
    "optim.clip=0.05",
    "memory.stream_slots=2",
    "optim.global_batch=2",
)

FAST = ("optim.global_batch=2", "eval.interval=0")


def on(strategy: str, devices: int = 2) -> tuple[str, ...]:
    return (f"strategy={strategy}", f"strategy.devices={devices}")


def run(root: Path) -> Path:
    return root / "audio_reference/main"


def rows(root: Path) -> list[dict[str, Any]]:
    return read_rows(run(root) / "metrics.jsonl")


def weights(root: Path) -> dict[str, torch.Tensor]:
    return dict(commit.load(newest(run(root))).weights)


def assert_near(first: Path, other: Path) -> None:
    """Losses within 1e-5; gaps are small differences of losses, and their intervals differences of those."""
    for row, same in zip(rows(first), rows(other), strict=True):
        for name in (n for n in row if n.startswith(("train/loss", "val/")) and n in same):
            near = 1e-5 if "loss" in name else 1e-3
            assert same[name] == pytest.approx(row[name], rel=near, abs=1e-6), (row["step"], name)


@pytest.fixture(scope="module")
def single(prepared: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune of 20 steps by one process."""
    root = tmp_path_factory.mktemp("single")
    assert command(*fit(prepared, clips, root, *FULL, "optim.steps=20")) == 0
    return root


@pytest.mark.parametrize(("way", "place"), [("zero1", ""), ("zero2", "disk"), ("zero3_offload", "")])
def test_every_way_of_sharing_gives_the_curve_of_one_process(
    way: str, place: str, single: Path, prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """20 steps on two ranks, with the optimizer's state on the device, in files and in host memory."""
    files = (f"strategy.offload={tmp_path / place}",) if place else ()
    arguments = fit(prepared, clips, tmp_path, *FULL, *on(way), *files, "optim.steps=20", "eval.interval=0")
    assert end(arguments, tmp_path / "log") == 0
    found, losses = ([row["train/loss"] for row in rows(root)] for root in (tmp_path, single))
    assert found == pytest.approx(losses, rel=1e-5)
    if place:
        assert {path.name for path in (tmp_path / place).iterdir()} == {
            "audio_reference-main-rank-00000", "audio_reference-main-rank-00001",
        }  # fmt: skip


def test_a_full_fine_tune_in_shares_is_measured_and_continued_as_one_process_does(
    single: Path, prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """20 steps on two ranks that share everything, held-out losses included; and a run that goes from way to way."""
    log, steps = tmp_path / "log", "optim.steps=20"
    kept = (*FULL, "memory.keep=everything", *on("zero3"))
    for last, together in ((10, 1), (20, 2)):  # first samples of their own, then each sample together
        more = (*kept, f"optim.steps={last}", f"strategy.sequence={together}")
        assert end(fit(prepared, clips, tmp_path / "zero3", *more), log) == 0
    assert_near(single, tmp_path / "zero3")
    for last, way in ((7, on("zero2")), (13, ()), (20, on("zero3_offload", 1))):
        arguments = fit(prepared, clips, tmp_path / "changing", *FULL, *way, f"optim.steps={last}")
        assert (end(arguments, log) if len(way) and "=2" in way[1] else command(*arguments)) == 0, way
    losses, changing = ([row["train/loss"] for row in rows(root)] for root in (single, tmp_path / "changing"))
    assert changing == pytest.approx(losses, rel=1e-5)
    alone = weights(single)
    for name in ("zero3", "changing"):
        shared = weights(tmp_path / name)
        assert shared.keys() == alone.keys()
        assert all(torch.allclose(shared[n], alone[n], rtol=1e-3, atol=1e-4) for n in alone)
    settled = [
        *fit(prepared, clips, tmp_path / "zero3", *FULL, steps)[1:],
        f"export.out={tmp_path / 'all.safetensors'}",
    ]
    assert command("evaluate", *settled) == command("export", *settled) == 0
    exported = load_file(tmp_path / "all.safetensors")
    assert any(name.endswith("transformer_blocks.0.attn1.to_q.weight") for name in exported)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_stopped_full_fine_tune_goes_on_bit_for_bit(name: str, prepared: Path, clips: Path, tmp_path: Path) -> None:
    """30 steps in bfloat16 with float32 masters, stopped by a signal to one rank."""
    more = (*FULL, "model.dtype=bfloat16", "optim.steps=30", *FAST, *on(name))
    arguments, log = fit(prepared, clips, tmp_path / "broken", *more), tmp_path / "log"
    with started(arguments, log) as process:
        wait_for(lambda: steps_done(run(tmp_path / "broken")) > 5, process)
        os.kill(children(process.pid)[1], signal.SIGTERM)
        assert process.wait() == 75
    assert end(arguments, log) == 0
    assert end(fit(prepared, clips, tmp_path / "whole", *more), log) == 0
    assert curve(run(tmp_path / "broken")) == curve(run(tmp_path / "whole"))
    first, second = newest(run(tmp_path / "broken")), newest(run(tmp_path / "whole"))
    for number in range(2):
        file = f"shard-{number:05d}-of-00002.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()
    masters = load_file(first / "shard-00000-of-00002.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


def test_an_adapter_in_shares_is_saved_as_one_process_saves_it(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """Masters and moments shared out, then not, then gradients as well: the files of one process in one go."""
    more, log = ("adapter.dropout=0.1", "adapter.ema=0.9", *FAST), tmp_path / "log"
    assert command(*fit(prepared, clips, tmp_path / "single", *more, "optim.steps=15")) == 0
    together = "strategy.sequence=2"  # each sample on both
    for last, way in ((5, (*on("zero1"), together)), (10, (*on("zero2"), together)), (15, on("zero2"))):
        arguments = fit(prepared, clips, tmp_path / "changing", *more, *way, f"optim.steps={last}")
        assert end(arguments, log) == 0, log.read_text()
    losses, changing = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("single", "changing"))
    assert changing == pytest.approx(losses, rel=1e-5)
    for file in ("weights.safetensors", "optimizer.safetensors", "average.safetensors"):
        one, other = (load_file(newest(run(tmp_path / n)) / file) for n in ("single", "changing"))
        assert other.keys() == one.keys()
        assert all(float((other[n] - one[n]).norm()) <= 1e-3 * float(one[n].norm()) + 1e-6 for n in one)


def test_a_step_on_several_devices_is_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    arguments = [
        "bench", "experiment=audio_reference", "model.weights=random", "strategy.device=cpu", "optim=adamw", *FULL,
        "optim.batch_size=1", "bench.steps=2", "bench.warmup=1", f"bench.out={out}", *on("zero3"),
    ]  # fmt: skip
    assert end(arguments, tmp_path / "log") == 0
    (record,) = json.loads(out.read_text())
    assert record["ranks"] == 2
    assert record["direct"] is False
    assert len(record["losses"]) == 3
