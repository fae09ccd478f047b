"""Optimizer steps on random latents, timed: what `bench` runs and what the GPU tests step through."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from ltx_train import rng
from ltx_train.assembly import from_config, model_builder, model_source, resolve
from ltx_train.assembly.setup import Setup
from ltx_train.config import Config, counted_fps
from ltx_train.contracts import Batch, Condition, ConditionKind, ModalityName, Role
from ltx_train.diffusion.grid import audio_latents
from ltx_train.memory.blocks.compile import graphs
from ltx_train.memory.planning.cards import GIB
from ltx_train.memory.weights.stores import PeerStore
from ltx_train.model import codecs
from ltx_train.model.transformer import Transformer
from ltx_train.training.step import OptimizerStep, StepRecipe

Step = Callable[[int], torch.Tensor]


def random_steps(setup: Setup, recipe: StepRecipe) -> Step:
    """`step(number)` takes one optimizer step on keyed random latents and returns its loss.

    The latents are made once: a run reads them in other processes.
    """
    optimizer_step, config = OptimizerStep(recipe, 0), setup.config
    batch = random_batch(config, setup.sharing.reader(setup.ranks.rank))
    count = len(batch.keys)

    def step(number: int) -> torch.Tensor:
        for round_ in range(recipe.micro_batches):
            first = (number * recipe.micro_batches + round_) * count
            optimizer_step.micro_batch(replace(batch, draws=tuple(first + i for i in range(count))))
        return optimizer_step.results[-1].loss

    return step


def random_batch(config: Config, number: int) -> Batch:
    """A batch of the first bucket's shapes, on the CPU."""
    bucket, mode, count = resolve.buckets(config)[0], config.mode, config.optim.batch_size
    sizes = model_source.layout(config).config["transformer"]
    video = (count, sizes["in_channels"], *bucket.latents)
    bins = codecs.LATENT_MEL_BINS
    audio = (count, sizes["audio_in_channels"] // bins, bucket.audio_tokens(counted_fps(config)), bins)
    voice = (*audio[:2], audio_latents(config.data.reference_s), bins)
    text, dtype = config.model.text_tokens, from_config.dtype(config)

    def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return rng.normal(shape, 0, "bench", name)

    return Batch(
        keys=tuple(f"bench{i}" for i in range(count)),
        speakers=("",) * count,
        draws=tuple(number * count + i for i in range(count)),
        fps=torch.full((count,), counted_fps(config)),
        video_latent=None if mode.video is Role.absent else numbers("video", video),
        audio_latent=None if mode.audio is Role.absent else numbers("audio", audio),
        video_context=numbers("text", (count, text, sizes["cross_attention_dim"])).to(dtype),
        audio_context=numbers("text/audio", (count, text, sizes["audio_cross_attention_dim"])).to(dtype),
        references={
            c.name: numbers(c.name, _scaled(video, c) if c.stream is ModalityName.video else voice)
            for c in mode.references
        },
        masks={
            c.source: torch.zeros(count, *(video if c.stream is ModalityName.video else audio[:3])[2:])
            for c in mode.conditions
            if c.kind is ConditionKind.mask
        },
    )


def _scaled(video: tuple[int, ...], condition: Condition) -> tuple[int, ...]:
    """The latent shape of a video reference beside a target's."""
    scale = condition.spatial_scale or 1
    frames = 1 + (video[2] - 1) // (condition.temporal_scale or 1)
    return (*video[:2], frames, video[3] // scale, video[4] // scale)


def timed(setup: Setup, step: Step, transformer: Transformer | None = None) -> dict[str, Any]:
    """Warm-up steps, then timed ones back to back as in a run, where the host runs ahead of the device.

    Times in seconds from the end of one step's last kernel to the end of the next step's, memory in GiB.
    """
    bench, device = setup.config.bench, setup.device
    started = time.perf_counter()
    losses = [float(step(0))]
    first = time.perf_counter() - started
    losses += [float(step(number)) for number in range(1, bench.warmup)]
    stream = None if transformer is None else model_builder.stream_of(transformer)
    if stream is not None:
        stream.verify()
        stream.stall_seconds()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    compiled = graphs()
    marks, timed_losses = [_mark(device)], list[torch.Tensor]()
    for number in range(bench.steps):
        timed_losses.append(step(bench.warmup + number))
        marks.append(_mark(device))
    losses += [float(loss) for loss in timed_losses]
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
        record["stall_s"] = round(stream.stall_seconds() / bench.steps, 4)
        if isinstance(stream.store, PeerStore):
            record["direct"] = stream.store.direct
    if device.type == "cuda":
        record["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
        record["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 2)
    return record


def _mark(device: torch.device) -> Any:
    """A point in time: on a GPU, when it has done everything that it was given so far."""
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
