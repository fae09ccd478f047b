"""DeepSpeed as the engine: the curve of one process, the project's own checkpoints, and moves between engines."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ltx_train.jobs.processes import _free_port
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import command
from tests.faults.harness import PATIENCE_S, SERVER, children, started, steps_done, wait_for
from tests.faults.test_ranks import end, fit
from tests.faults.test_resume import curve, newest
from tests.faults.test_sliced import FULL, on, run, weights

pytestmark = pytest.mark.slow
# Otherwise all weights of the tiny model are too small to be sliced.
SLICED = ("strategy.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",)
LORA = ("memory=none", "adapter.dropout=0.1", "optim.global_batch=2")
MIXTURE = ("mixture={audio_reference: 2, a2v: 1, t2a: 1}", "eval.quantiles=1", "sigma.kind=high")
INT8 = ("memory.quantize=int8",)
CLIPS = ("eval.samples=3", "sample.steps=2")


needs_aio = pytest.mark.skipif(
    not os.environ.get("LTX_TRAIN_TEST_AIO"), reason="DeepSpeed compiles its file access for five minutes: make aio"
)


def losses(root: Path) -> list[float]:
    return [row["train/loss"] for row in read_rows(run(root) / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("stages", "settings", "more"),
    [
        ((1, 2, 3), FULL, ()), ((2,), (*LORA, *MIXTURE), ()), ((1, 2, 3), (*LORA, "optim.clip=0"), ()),
        ((3,), (*LORA, *INT8), ("strategy.sequence=2",)), ((3,), FULL, ("strategy.offload=cpu",)),
        pytest.param((3,), FULL, ("strategy.offload={folder}",), marks=needs_aio),
    ],
    ids=["full", "mixture", "bitwise", "int8-sequence", "offload", "files"],
)  # fmt: skip
def test_two_ranks_give_the_curve_of_one_process(
    stages: tuple[int, ...], settings: tuple[str, ...], more: tuple[str, ...], prepared: Path, clips: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """20 steps, held-out losses included."""
    settings = (*settings, "optim.steps=20", "eval.interval=20")
    assert command(*fit(prepared, clips, tmp_path / "one", *settings)) == 0
    one = run(tmp_path / "one")
    for stage in stages:
        root, log = tmp_path / str(stage), tmp_path / "log"
        given = [text.format(folder=tmp_path / "state") for text in more]
        arguments = fit(prepared, clips, root, *settings, *on(f"deepspeed_zero{stage}"), *SLICED, *given)
        assert end(arguments, log) == 0, log.read_text()[-3000:]
        assert losses(root) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
        mine, theirs = (read_rows(folder / "metrics.jsonl")[-1] for folder in (run(root), one))
        assert mine["val/loss"] == pytest.approx(theirs["val/loss"], rel=1e-6)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
        if "optim.clip=0" in settings:
            # Without a norm, which is summed in another order, nothing differs at all.
            assert losses(root) == losses(tmp_path / "one")
            for file in ("weights.safetensors", "optimizer.safetensors"):
                first, other = load_file(newest(one) / file), load_file(newest(run(root)) / file)
                assert first.keys() == other.keys()
                assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        (FULL, ("deepspeed_zero3", "zero2", "deepspeed_zero2", "", "deepspeed_zero1", "zero3")),
        (LORA, ("deepspeed_zero3", "ddp", "deepspeed_zero2", "", "deepspeed_zero3")),
    ],
    ids=["full", "adapter"],
)
def test_a_run_moves_between_engines(
    settings: tuple[str, ...], way: tuple[str, ...], prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """Two steps each: DeepSpeed, this project's ZeRO, one process."""
    count = 2 * len(way)
    assert command(*fit(prepared, clips, tmp_path / "one", *settings, f"optim.steps={count}", "eval.interval=0")) == 0
    for number, name in enumerate(way, start=1):
        arguments = fit(prepared, clips, tmp_path / "moving", *settings, f"optim.steps={2 * number}", "eval.interval=0")
        sliced = SLICED if "deepspeed" in name else ("strategy.deepspeed={}",)
        assert (end([*arguments, *on(name), *sliced], tmp_path / "log") if name else command(*arguments)) == 0, name
    assert losses(tmp_path / "moving") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    alone, moved = weights(tmp_path / "one"), weights(tmp_path / "moving")
    assert alone.keys() == moved.keys()
    assert all(torch.allclose(moved[name], alone[name], rtol=1e-3, atol=1e-4) for name in alone)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (3, (*FULL, "model.dtype=bfloat16")), (2, LORA),
        pytest.param(3, (*FULL, "strategy.offload={folder}"), marks=needs_aio), (3, (*FULL, "strategy.hpz=2")),
    ],
    ids=["full-zero3-bf16", "adapter-zero2", "full-zero3-files", "full-zero3-hpz"],
)  # fmt: skip
def test_a_stopped_run_goes_on_bit_for_bit(
    stage: int, settings: tuple[str, ...], prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """A signal to one rank."""
    given = [text.format(folder=tmp_path / "state") for text in settings]
    more = (*given, *on(f"deepspeed_zero{stage}"), *SLICED, "optim.steps=14", "eval.interval=0")
    arguments, log = fit(prepared, clips, tmp_path / "broken", *more), tmp_path / "log"
    with started(arguments, log) as process:
        wait_for(lambda: steps_done(run(tmp_path / "broken")) > 3, process)
        os.kill(children(process.pid)[1], signal.SIGTERM)
        assert process.wait() == 75
    assert end(arguments, log) == 0
    assert end(fit(prepared, clips, tmp_path / "whole", *more), log) == 0
    assert curve(run(tmp_path / "broken")) == curve(run(tmp_path / "whole"))
    first, second = newest(run(tmp_path / "broken")), newest(run(tmp_path / "whole"))
    files = [path.name for path in first.glob("*.safetensors")]
    assert len(files) >= 2
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(prepared: Path, clips: Path, tmp_path: Path) -> None:
    more = (*on("deepspeed_zero3"), *SLICED, "optim.steps=20", "optim.lr=1e30", "optim.clip=0", "eval.interval=0")
    assert end(fit(prepared, clips, tmp_path, *FULL, *more), tmp_path / "log") == 79
    log = (tmp_path / "log").read_text()
    assert "5 in a row" in log
    assert "Traceback" not in log


def test_an_adapter_is_exported_and_evaluated(prepared: Path, clips: Path, tmp_path: Path) -> None:
    arguments = fit(
        prepared, clips, tmp_path, *LORA, *on("deepspeed_zero3"), *SLICED, "optim.steps=2", "eval.interval=2"
    )
    assert end(arguments, tmp_path / "log") == 0
    assert "train/adapter_norm_ratio" in read_rows(run(tmp_path) / "metrics.jsonl")[-1]
    assert command("evaluate", str(run(tmp_path))) == 0
    assert command("export", str(run(tmp_path)), f"export.out={tmp_path / 'voice.safetensors'}") == 0
    assert command("inspect", str(run(tmp_path)), f"inspect.file={tmp_path / 'voice.safetensors'}") == 0


def test_two_machines_of_two_ranks_give_the_curve_of_one_process(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """An int8 base sliced within each machine, gradients summed over both; held-out losses and clips shared out over
    all four ranks."""
    settings = (*LORA, *INT8, "optim.global_batch=4", "optim.steps=4", "eval.interval=4", *CLIPS)
    assert command(*fit(prepared, clips, tmp_path / "one", *settings)) == 0
    arguments = fit(prepared, clips, tmp_path / "four", *settings, *on("zero3"))
    with ExitStack() as stack:
        shared = {
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        ranks = [
            stack.enter_context(
                started(arguments, tmp_path / f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank % 2), **shared)
            )
            for rank in range(4)
        ]
        assert [process.wait() for process in ranks] == [0] * 4, (tmp_path / "log0").read_text()[-2000:]
    assert "4 on 2 machines, strategy=zero3, DeepSpeed's engine" in (tmp_path / "log0").read_text()
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    mine, theirs = (read_rows(run(tmp_path / name) / "metrics.jsonl")[-1] for name in ("four", "one"))
    for name in (n for n in theirs if n.startswith("val/")):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5 if "loss" in name else 1e-3, abs=1e-6), name
    assert_same_clips(tmp_path / "one", tmp_path / "four")


@pytest.mark.parametrize(
    "way",
    [("zero3",), ("ddp", "strategy.sequence=2"), ("deepspeed_zero3", *FULL, *SLICED)],
    ids=["own", "sequence", "full"],
)
def test_ranks_that_pass_together_generate_the_clips_of_one_process(
    way: tuple[str, ...], prepared: Path, clips: Path, tmp_path: Path
) -> None:
    """Three clips on two ranks: one of them repeats a pass. The weights stay, and with them the clips."""
    settings = (*way[1:], "optim.lr=0", "optim.steps=1", "eval.interval=1", "eval.quantiles=1", *CLIPS)
    alone = [text for text in settings if not text.startswith("strategy.")]
    assert command(*fit(prepared, clips, tmp_path / "one", *alone)) == 0
    assert end(fit(prepared, clips, tmp_path / "two", *settings, *on(way[0])), tmp_path / "log") == 0
    assert_same_clips(tmp_path / "one", tmp_path / "two")


def assert_same_clips(first: Path, other: Path) -> None:
    one, two = (sorted((run(root) / "samples/heldout").glob("step-*/*.mp4")) for root in (first, other))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 3
    given = [{p.parent.name for p in (run(root) / "samples").rglob("*.mp4")} for root in (first, other)]
    assert given[0] == given[1] > {"base", "real"}
    clips = [(decoded(path), decoded(same)) for path, same in zip(one, two, strict=True)]
    for number, ((pictures, sound), (others, heard)) in enumerate(clips):
        further, noise = clips[number - 1][0]
        # Sums in another order change latents a little, and the encoders of the file make more of it, most of all that
        # of sounds. Another clip is farther away.
        assert np.abs(pictures - others).mean() < 0.05 * np.abs(pictures - further).mean()
        assert np.abs(sound - heard).mean() < 0.5 * np.abs(sound - noise).mean()


def decoded(path: Path) -> tuple[Any, Any]:
    """Pictures in 0 to 255 and the waveform of a clip."""
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        sound = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.stack(pictures), np.concatenate(sound, -1)


def _gathers_on_a_rank(rank: int, hpz: int, meeting: str, answers: Any) -> None:
    """Puts (phase, ranks that gathered together) of every gather of two steps."""
    from ltx_train.updates.deepspeed_engine import EngineSettings, open_engine

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    seen: list[tuple[str, tuple[int, ...]]] = []
    phase, plain = "start", dist.all_gather_into_tensor

    def recorded(*arguments: Any, group: Any = None, **more: Any) -> Any:
        seen.append((phase, tuple(dist.get_process_group_ranks(group or dist.group.WORLD))))
        return plain(*arguments, group=group, **more)

    dist.all_gather_into_tensor = recorded  # before DeepSpeed takes it
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=4)
        module = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(3)])
        more = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1}}
        settings = EngineSettings(
            stage=3, full=True, dtype=torch.float32, clip=0.0, offload=None, hpz=hpz, extra=more
        )  # fmt: skip
        engine = open_engine(module, torch.optim.AdamW(module.parameters()), settings, torch.device("cpu"))
        for _ in range(2):
            phase = "forward"
            loss = engine(torch.randn(2, 32, generator=torch.Generator().manual_seed(rank))).square().mean()
            phase = "backward"
            engine.backward(loss)
            phase = "step"
            engine.step()
    finally:
        answers.put((rank, seen))


@pytest.mark.parametrize("hpz", [1, 2])
def test_backward_gathers_within_a_machine(hpz: int, tmp_path: Path) -> None:
    """Four ranks on two machines. With a second slice of the weights, no gather of backward leaves a machine."""
    answers = SERVER.Queue()
    ranks = [
        SERVER.Process(target=_gathers_on_a_rank, args=(rank, hpz, str(tmp_path / "meeting"), answers))
        for rank in range(4)
    ]  # fmt: skip
    for process in ranks:
        process.start()
    seen = dict(answers.get(timeout=PATIENCE_S) for _ in ranks)
    for process in ranks:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    everyone = (0, 1, 2, 3)
    for rank, gathers in seen.items():
        own = everyone if hpz == 1 else everyone[rank // 2 * 2 :][:2]
        # The first forward finds the second slice as new as the first.
        assert everyone in {group for phase, group in gathers if phase == "forward"}
        assert {group for phase, group in gathers if phase == "backward"} == {own}
