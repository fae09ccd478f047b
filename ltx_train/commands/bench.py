"""`ltx-train bench`: speed and memory of a training step on random latents of the first bucket, as JSON."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train import rng
from ltx_train.commands import optimizing, planning, session, summary, transformers
from ltx_train.config import Config, parse_bucket
from ltx_train.contracts import Batch, Condition, ConditionKind, Exit, ModalityName, Role, StepResult, UserError
from ltx_train.diffusion import conditions, objective, positions, transfer
from ltx_train.diffusion.loss import Weights
from ltx_train.memory.cards import GIB, card_of_device
from ltx_train.memory.compile import graphs
from ltx_train.memory.footprint import model_flops
from ltx_train.memory.graph import StepGraphs
from ltx_train.memory.origin import PeerOrigin
from ltx_train.memory.plan import Planned
from ltx_train.memory.recompute import BlockRunner
from ltx_train.model import adapter, codecs
from ltx_train.model.transformer import Transformer
from ltx_train.training.ranks import Ranks, found, joined
from ltx_train.training.updates import Updates


def run(config: Config) -> int:
    """Prints one record; bench.out collects records of several calls in one list. Several devices step together, each
    in a process of its own (`launch.command`)."""
    ranks = found(os.environ)
    if config.bench.baseline and ranks.world > 1:
        raise UserError("bench.baseline=true compares one device: set strategy=single")
    peer = _peer(config) if config.bench.baseline else {}
    with joined(ranks, session.device(config, ranks.local), config.strategy.start_timeout_s or 86400):
        return _run(config, ranks, peer)


def _run(config: Config, ranks: Ranks, peer: dict[str, Any]) -> int:
    config, planned = ranks.lead(lambda: planning.settle(config))
    device = session.device(config, ranks.local if ranks.world > 1 else None)
    started = time.perf_counter()
    transformer, updates = optimizing.opened(config, ranks)
    loaded = time.perf_counter() - started
    try:
        measured = timed(config, _step(config, transformer, updates, device, ranks), device, transformer)
    except torch.OutOfMemoryError as error:
        raise UserError(planning.out_of_memory(config, planned)) from error
    measured |= _most(measured, ranks)
    if ranks.leads:
        about = {**_about(config), "ranks": ranks.world, "load_s": round(loaded, 1)}
        _report(config, planned, {**about, **measured, **_rates(config, measured, device, ranks), **peer})
    return Exit.DONE


def _most(measured: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Of memory, what the rank that takes most of it takes."""
    everyone = ranks.gather(measured)
    return {name: max(m[name] for m in everyone) for name in measured if name.endswith("_gib")}


def _report(config: Config, planned: Planned | None, record: dict[str, Any]) -> None:
    if planned is not None:
        record["memory"] = summary.describe(planned)
        record["planned_gib"] = round(planned.footprint.gib, 2)
        record["planned_step_s"] = round(planned.footprint.step_s, 3)
    print(json.dumps(record))
    if config.bench.out:
        _collect(Path(config.bench.out), record)


def _peer(config: Config) -> dict[str, Any]:
    """The plain path in a process of its own, which gives its memory back before ours is measured."""
    from ltx_train.commands import baseline  # imports peft and diffusers a second time, for those who compare

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured = pool.submit(baseline.measure, config).result()
    found = {f"peer_{name}": measured[name] for name in ("step_s_median", "peak_reserved_gib") if name in measured}
    quantized = "" if config.memory.quantize == "none" else f", optimum-quanto {config.memory.quantize}"
    return {"peer": f"diffusers model, eager, every block checkpointed{quantized}; same call", **found}


def _step(
    config: Config, transformer: Transformer, updates: Updates, device: torch.device, ranks: Ranks
) -> Callable[[int], torch.Tensor]:
    dropout = adapter.DropoutKeys(transformer)

    def keyed(batch: Batch) -> None:
        pairs = zip(batch.keys, batch.draws, strict=True)
        dropout.set([rng.key_seed(config.run.seed, "dropout", key, draw) for key, draw in pairs])

    recorded = transformers.recorded(config, transformer, updates.gathering, device)
    return optimizer_step(config, transformer, updates, device, keyed, recorded, ranks.rank // config.strategy.sequence)


def optimizer_step(
    config: Config, predict: objective.Predictor, updates: Updates, device: torch.device,
    before: Callable[[Batch], None] = lambda _batch: None, recorded: StepGraphs | None = None, rank: int = 0,
) -> Callable[[int], torch.Tensor]:  # fmt: skip
    """One whole optimizer step on keyed random data: noising, forward, backward, clipping, update. The data itself is
    made once: a run's comes from workers of its own."""
    distribution = session.sigma_distribution(config)
    weights = Weights(config.loss.video_weight, config.loss.audio_weight, config.loss.weighting)
    once: Callable[[objective.Pass], StepResult] = recorded or partial(objective.backward, predict)
    data = random_batch(config, rank)

    def step(number: int) -> torch.Tensor:
        count = config.optim.batch_size
        batch = replace(data, draws=tuple(number * count + i for i in range(count)))
        before(batch)
        draws = conditions.draw(batch, config.mode, distribution, config.run.seed)
        inputs = transfer.to_device(conditions.assemble(batch, config.mode, draws), device)
        loss = once(objective.Pass(inputs, weights)).loss
        updates.passed()
        updates.average()
        updates.step(config.optim.clip)
        return loss

    return step


def random_batch(config: Config, number: int) -> Batch:
    """A batch of the first bucket's shapes, on the CPU."""
    width, height, frames = parse_bucket(config.data.buckets[0])
    sizes = session.layout(config).config["transformer"]
    count, mode = config.optim.batch_size, config.mode
    video = (count, sizes["in_channels"], positions.latent_frames(frames), height // 32, width // 32)
    audio_channels = sizes["audio_in_channels"] // codecs.LATENT_MEL_BINS
    audio = (count, audio_channels, positions.audio_latents(frames / config.data.fps), codecs.LATENT_MEL_BINS)
    voice = (*audio[:2], positions.audio_latents(config.data.reference_s), audio[3])
    text, dtype = config.model.text_tokens, session.dtype(config)

    def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return rng.normal(shape, 0, "bench", name)

    return Batch(
        keys=tuple(f"bench{i}" for i in range(count)),
        speakers=("",) * count,
        draws=tuple(number * count + i for i in range(count)),
        fps=torch.full((count,), config.data.fps),
        video_latent=None if mode.video is Role.absent else numbers("video", video),
        audio_latent=None if mode.audio is Role.absent else numbers("audio", audio),
        video_context=numbers("text", (count, text, sizes["cross_attention_dim"])).to(dtype),
        audio_context=numbers("text/audio", (count, text, sizes["audio_cross_attention_dim"])).to(dtype),
        references={
            c.name: numbers(c.name, _smaller(video, c) if c.stream is ModalityName.video else voice)
            for c in mode.references
        },
        masks={
            c.source: torch.zeros(count, *(video if c.stream is ModalityName.video else audio[:3])[2:])
            for c in mode.conditions
            if c.kind is ConditionKind.mask
        },
    )


def _smaller(video: tuple[int, ...], condition: Condition) -> tuple[int, ...]:
    """The shape of a reference beside a target's."""
    scale = condition.spatial_scale or 1
    return (*video[:2], -(-video[2] // condition.temporal_scale), video[3] // scale, video[4] // scale)


def timed(
    config: Config, step: Callable[[int], torch.Tensor], device: torch.device, transformer: Transformer | None = None
) -> dict[str, Any]:
    """Warm-up, then steps one behind the other as in a run, where the host goes ahead of the device; times in seconds
    from the end of one step's last kernel to that of the next, memory in GiB."""
    started = time.perf_counter()
    losses = [float(step(0))]
    first = time.perf_counter() - started
    losses += [float(step(number)) for number in range(1, config.bench.warmup)]
    runner = transformer.run_block if transformer is not None else None
    stream = runner.stream if isinstance(runner, BlockRunner) else None
    if stream is not None:
        stream.verify()
        stream.stall_seconds()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    compiled = graphs()
    marks, seen = [_mark(device)], list[torch.Tensor]()
    for number in range(config.bench.steps):
        seen.append(step(config.bench.warmup + number))
        marks.append(_mark(device))
    losses += [float(loss) for loss in seen]
    times = [_seconds(before, after) for before, after in pairwise(marks)]
    record: dict[str, Any] = {
        "step_s_median": round(statistics.median(times), 4),
        "step_s_min": round(min(times), 4),
        "first_step_s": round(first, 1),
        "graphs": compiled,
        "recompiled": graphs() - compiled,
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "losses": [round(value, 6) for value in losses],
    }
    if stream is not None:
        record["stall_s"] = round(stream.stall_seconds() / config.bench.steps, 4)
        if isinstance(stream.origin, PeerOrigin):
            record["direct"] = stream.origin.direct
    if device.type == "cuda":
        record["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
        record["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 2)
    return record


def _rates(config: Config, measured: dict[str, Any], device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Tokens per second, and the share of the card's dense bf16 rate that the model's own arithmetic takes."""
    needed, seconds = planning.need(config), measured["step_s_median"]
    work = needed.work
    samples = configuration.readers(config, ranks.world) * work.batch
    rates = {"tokens_per_s": round(samples * (work.video * work.sequence + work.audio) / seconds, 1)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = card_of_device(properties.name, properties.total_memory / GIB)
        flops = model_flops(needed.size, work, full=needed.trained.full)
        rates["mfu"] = round(flops / seconds / (card.bf16_tflops * 1e12), 4)
    return rates


def _about(config: Config) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "case": config.bench.case,
        "device": gpu,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "command": "ltx-train " + " ".join(sys.argv[1:]),
    }


def _collect(path: Path, record: dict[str, Any]) -> None:
    records: list[Any] = json.loads(path.read_text()) if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*records, record], indent=1) + "\n")


def _mark(device: torch.device) -> Any:
    """A moment: on a GPU, when it has done everything that it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1000
