"""Two processes on one run: equal to one process, stopped by any of them, and never left hanging."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ltx_train.distributed.ranks import Ranks, first_host, ranks_from_environment, rendezvous
from ltx_train.training.checkpoints import commit
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import command, cut, settings
from tests.faults.harness import children, started, steps_done, wait_for
from tests.faults.test_resume import curve, newest

pytestmark = pytest.mark.slow
TWO = ("strategy=ddp", "strategy.devices=2")


def fit(prepared: Path, clips: Path, runs: Path, *more: str) -> list[str]:
    return [
        "fit", *settings(prepared, clips), f"run.root={runs}", f"model.path={cut(2)}", "optim.batch_size=1",
        "optim.global_batch=4",
        "logger.every=1", "eval.interval=10", "eval.sigmas=[0.5]",
        "eval.max_samples=3", "checkpoint.interval=50", "data.workers=0",
        "strategy.device=cpu", "optim=adamw", "optim.schedule=constant", *more,
    ]  # fmt: skip


def end(arguments: list[str], log: Path) -> int:
    with started(arguments, log) as process:
        return process.wait()


def test_two_ranks_give_the_curve_of_one(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """20 steps on two ranks, held-out losses and the reference gap included; and a run of one process that goes on at
    step 5 on two ranks which take each sample together."""
    alone = fit(prepared, clips, tmp_path / "one", "checkpoint.interval=5", "checkpoint.keep=9", "optim.steps=20")
    assert command(*alone) == 0
    assert end(fit(prepared, clips, tmp_path / "two", "optim.steps=20", *TWO), tmp_path / "log") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "changing")
    for step in (10, 15, 20):
        shutil.rmtree(tmp_path / f"changing/audio_reference/main/checkpoints/step-{step:06d}")
    together = fit(prepared, clips, tmp_path / "changing", "optim.steps=20", *TWO, "strategy.sequence=2")
    assert end(together, tmp_path / "log") == 0
    one, two, changed = (
        read_rows(tmp_path / n / "audio_reference/main/metrics.jsonl") for n in ("one", "two", "changing")
    )
    assert len(one) == len(two) == 20
    compared = [k for k in one[-1] if k.startswith(("train/", "val/"))]
    assert "val/reference_gap" in compared
    for row, other in zip(one, two, strict=True):
        for name in set(compared) & set(row):
            # Gaps and gains are small differences of losses, and their intervals differences of those.
            near = 1e-5 if "loss" in name else 1e-3
            assert other[name] == pytest.approx(row[name], rel=near, abs=1e-6), (row["step"], name)
    assert [r["train/loss"] for r in changed] == pytest.approx([r["train/loss"] for r in one], rel=1e-5)
    for name in ("val/loss", "val/reference_gap", "val/reference_attention"):
        near = 1e-5 if name == "val/loss" else 1e-3
        assert changed[-1][name] == pytest.approx(one[-1][name], rel=near, abs=1e-6), name


def test_two_ranks_give_the_curve_of_one_in_a_mixture_with_balance_and_average(
    prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """Samples keep their modes, averages of losses and weights agree, whatever rank and micro-batch a sample is in, and
    also where ranks have to go through every pass together."""
    more = (
        "mixture={audio_reference: 2, a2v: 1, t2a: 1}", "loss.balance=auto", "adapter.ema=0.9", "optim.steps=10",
        "eval.quantiles=1", "sigma.kind=high",
    )  # fmt: skip
    assert command(*fit(prepared, clips, tmp_path / "one", *more)) == 0
    for last, how in ((3, TWO), (7, ("strategy=zero3", "strategy.devices=2")), (10, ("strategy=zero2", *TWO[1:]))):
        two = fit(prepared, clips, tmp_path / "two", *more, *how, f"optim.steps={last}")
        assert end(two, tmp_path / "log") == 0
    assert command(*fit(prepared, clips, tmp_path / "wide", *more, "optim.batch_size=4")) == 0
    folders = [tmp_path / n / "audio_reference/main" for n in ("one", "two", "wide")]
    one, *others = (read_rows(folder / "metrics.jsonl") for folder in folders)
    assert "train/weight_video" in one[-1]
    for other in others:
        for row, same in zip(one, other, strict=True):
            for name in ("train/loss", "train/loss_video", "train/loss_audio", "train/weight_video", "val/loss"):
                # A shorter run ends with a measurement of its own.
                assert (name in same) == (name in row) or name == "val/loss"
                if name in same and name in row:
                    assert same[name] == pytest.approx(row[name], rel=1e-5), (row["step"], name)
    averages = [load_file(newest(folder) / "average.safetensors") for folder in folders]
    for name, tensor in averages[0].items():
        for other in averages[1:]:
            assert float((other[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()) + 1e-6


def test_two_ranks_that_share_the_base_are_bitwise_two_with_a_copy_each(
    prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """20 steps with int8 products, dropout and measurements, in a run that goes on from one kind to the other."""
    more = (
        "optim.steps=20",
        "adapter.dropout=0.1",
        "memory.compute=int8",
        "memory.quantize=int8",
        "memory.stream_slots=2",
    )
    shared = ("strategy=zero3", "strategy.devices=2")
    assert end(fit(prepared, clips, tmp_path / "copies", *more, *TWO), tmp_path / "log") == 0
    for last, how in ((13, shared), (20, TWO)):
        steps = f"optim.steps={last}"
        assert end(fit(prepared, clips, tmp_path / "changing", *more, *how, steps), tmp_path / "log") == 0
    first, other = (tmp_path / n / "audio_reference/main" for n in ("copies", "changing"))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert (newest(first) / file).read_bytes() == (newest(other) / file).read_bytes()
    one, two = (read_rows(folder / "metrics.jsonl") for folder in (first, other))
    names = [n for n in one[-1] if n.startswith(("train/", "val/"))]
    assert "val/reference_gap" in names
    for row, same in zip(one, two, strict=True):
        for name in set(names) & set(row):
            assert same[name] == pytest.approx(row[name], rel=1e-6, abs=1e-9), (row["step"], name)
    assert ["perf/stream_stall_s" in rows[5] for rows in (one, two)] == [False, True], "blocks went through the ring"


def _one_after_the_other(pids: list[int], number: signal.Signals) -> None:
    for pid in pids[1:]:
        os.kill(pid, number)
        time.sleep(0.5)


def _twice(pids: list[int], number: signal.Signals) -> None:
    for pid in (*pids[1:], *pids[1:]):
        os.kill(pid, number)
        time.sleep(0.1)


PATTERNS: list[tuple[str, signal.Signals, Callable[[list[int], signal.Signals], Any]]] = [
    ("the command", signal.SIGTERM, lambda pids, number: os.kill(pids[0], number)),
    ("rank 0", signal.SIGTERM, lambda pids, number: os.kill(pids[1], number)),
    ("rank 1", signal.SIGUSR1, lambda pids, number: os.kill(pids[2], number)),
    ("staggered", signal.SIGTERM, _one_after_the_other),
    ("twice", signal.SIGUSR1, _twice),
]


def test_every_pattern_of_signals_saves_and_the_run_is_bitwise_unbroken(
    prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """Five stops in 30 steps, by SIGTERM and SIGUSR1: the command, one rank, the other, one after the other, both
    twice."""
    steps = "optim.steps=30"
    arguments = fit(prepared, clips, tmp_path / "broken", *TWO, steps)
    run = tmp_path / "broken" / "audio_reference" / "main"
    for name, number, send in PATTERNS:
        before = steps_done(run)
        with started(arguments, tmp_path / "log") as process:
            wait_for(lambda: steps_done(run) > before + 1, process)  # noqa: B023
            steps_at_signal = steps_done(run)
            send([process.pid, *_two(children(process.pid))], number)
            assert process.wait() == 75, name
        saved = int(newest(run).name[5:])
        assert saved == steps_done(run) >= steps_at_signal
    assert end(arguments, tmp_path / "log") == 0
    assert end(fit(prepared, clips, tmp_path / "whole", *TWO, steps), tmp_path / "log") == 0
    whole = tmp_path / "whole" / "audio_reference" / "main"
    assert len(curve(whole)) == 30
    assert curve(run) == curve(whole)
    for part in ("weights.safetensors", "optimizer.safetensors"):
        first, second = load_file(newest(whole) / part), load_file(newest(run) / part)
        assert all(bool((first[k] == second[k]).all()) for k in first)


def _two(pids: list[int]) -> list[int]:
    assert len(pids) == 2
    return pids


@pytest.mark.parametrize("delay", [0.0, 0.4, 1.2])
def test_a_signal_while_ranks_start_is_a_preemption(delay: float, prepared: Path, clips: Path, tmp_path: Path) -> None:
    """They have just been started, or meet, or build the model."""
    with started(fit(prepared, clips, tmp_path, *TWO, "optim.steps=500"), tmp_path / "log") as process:
        wait_for(lambda: len(children(process.pid)) == 2, process)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 75
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_stopped_rank_is_noticed_and_named(prepared: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "audio_reference" / "main"
    arguments = fit(
        prepared, clips, tmp_path, *TWO, "optim.steps=500", "strategy.step_timeout_s=4", "checkpoint.interval=2"
    )
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: steps_done(run) > 2, process)
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        assert process.wait() == 76
    assert "rank 0 made no progress" in (tmp_path / "log").read_text()
    assert "Thread" in (run / "stacks" / "rank-0.txt").read_text()
    assert commit.committed(run / "checkpoints")


def test_a_killed_rank_ends_the_run(prepared: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "audio_reference" / "main"
    with started(fit(prepared, clips, tmp_path, *TWO, "optim.steps=500"), tmp_path / "log") as process:
        wait_for(lambda: steps_done(run) > 2, process)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait() == 128 + signal.SIGKILL
    log = (tmp_path / "log").read_text()
    assert "rank 1 was killed by SIGKILL" in log
    assert "Traceback" not in log


def test_an_error_of_rank_0_is_printed_once(prepared: Path, clips: Path, tmp_path: Path) -> None:
    arguments = fit(prepared, clips, tmp_path, *TWO, "optim.steps=3", "optim.global_batch=3")
    assert end(arguments, tmp_path / "log") == 77
    log = (tmp_path / "log").read_text()
    assert log.count("optim.global_batch=3 is no multiple of 2 devices") == 1
    assert "Traceback" not in log


def test_doctor_lets_the_processes_of_a_run_meet(tmp_path: Path) -> None:
    arguments = [
        "doctor", "experiment=audio_reference", "model.weights=random", f"data.root={tmp_path / 'none'}",
        f"run.root={tmp_path}", "strategy.device=cpu", *TWO,
    ]  # fmt: skip
    assert end(arguments, tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert "all-reduce  2 processes: 64 MiB in" in log


def test_who_this_process_is() -> None:
    assert ranks_from_environment({}) == Ranks()
    assert ranks_from_environment({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}) == Ranks(5, 8, 1)
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert ranks_from_environment(slurm) == Ranks(3, 4, 1)
    assert ranks_from_environment({**slurm, "SLURM_NTASKS": "1"}) == Ranks()
    # The batch shell has these too, and is no task.
    assert ranks_from_environment({k: v for k, v in slurm.items() if k != "SLURM_STEP_ID"}) == Ranks()
    names = {
        "gpu[03-07,9],login": "gpu03", "node1,node2": "node1", "n[1-2]": "n1", "gpu[01-02].cluster": "gpu01.cluster",
        "r[1-2]n[07,9].x,a": "r1n07.x",
    }  # fmt: skip
    assert {nodes: first_host(nodes) for nodes in names} == names


def test_ranks_meet_on_the_first_node_of_their_step() -> None:
    """A step that was started from a login node carries the login node's address."""
    slurm = {"SLURM_STEP_NODELIST": "localhost,other", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "7"}
    assert rendezvous(slurm) == {"MASTER_ADDR": "localhost", "MASTER_PORT": "20007"}
    unknown = {**slurm, "SLURM_STEP_NODELIST": "no-such-host.invalid"}
    assert rendezvous(unknown)["MASTER_ADDR"] == "10.0.0.1"
