"""`ltx-train bench`: speed and memory of a training step on random latents of the first bucket, as JSON."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ltx_train import rng
from ltx_train.commands import session
from ltx_train.commands.fit import trainable_transformer
from ltx_train.config import Config, parse_bucket
from ltx_train.contracts import Batch, Exit, Role
from ltx_train.diffusion import conditions, objective, positions
from ltx_train.memory.recompute import BlockRunner
from ltx_train.model import adapter, codecs
from ltx_train.model.transformer import Transformer
from ltx_train.training.optim import build_optimizer


def run(config: Config) -> int:
    """Prints one record; bench.out collects records of several calls in one list."""
    device = session.device(config)
    if config.bench.budget_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.bench.budget_gib * 2**30 / total), device)
    started = time.perf_counter()
    transformer = trainable_transformer(config)
    loaded = time.perf_counter() - started
    step = _step(config, transformer, device)
    record = {**_about(config), "load_s": round(loaded, 1), **_measure(config, step, transformer, device)}
    print(json.dumps(record))
    if config.bench.out:
        _collect(Path(config.bench.out), record)
    return Exit.DONE


def _step(config: Config, transformer: Transformer, device: torch.device) -> Callable[[int], torch.Tensor]:
    """One whole optimizer step on keyed random data: noising, forward, backward, clipping, update."""
    parameters = list(adapter.trainable_parameters(transformer).values())
    o = config.optim
    optimizer = build_optimizer(o.name, parameters, o.lr, (o.betas[0], o.betas[1]), o.weight_decay)
    distribution = session.sigma_distribution(config)

    def step(number: int) -> torch.Tensor:
        batch = random_batch(config, number)
        draws = conditions.draw(batch, config.mode, distribution, config.run.seed)
        inputs = conditions.to_device(conditions.assemble(batch, config.mode, draws), device)
        loss = objective.losses(transformer, inputs, config.loss.video_weight, config.loss.audio_weight).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, o.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def random_batch(config: Config, number: int) -> Batch:
    """A batch of the first bucket's shapes, on the CPU."""
    width, height, frames = parse_bucket(config.data.buckets[0])
    sizes = session.weights(config).config["transformer"]
    count, mode = config.optim.batch_size, config.mode
    video = (count, sizes["in_channels"], positions.latent_frames(frames), height // 32, width // 32)
    audio_channels = sizes["audio_in_channels"] // codecs.LATENT_MEL_BINS
    audio = (count, audio_channels, positions.audio_latents(frames / config.data.fps), codecs.LATENT_MEL_BINS)
    reference = (*audio[:2], positions.audio_latents(config.data.reference_s), audio[3])
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
        reference_audio=numbers("reference", reference) if mode.uses_reference else None,
    )


def _measure(
    config: Config, step: Callable[[int], torch.Tensor], transformer: Transformer, device: torch.device
) -> dict[str, Any]:
    started = time.perf_counter()
    losses = [float(step(0))]
    first = time.perf_counter() - started
    losses += [float(step(number)) for number in range(1, config.bench.warmup)]
    runner = transformer.run_block
    stream = runner.stream if isinstance(runner, BlockRunner) else None
    if stream is not None:
        stream.verify()
        stream.stall_seconds()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    for number in range(config.bench.steps):
        started = time.perf_counter()
        loss = step(config.bench.warmup + number)
        _synchronize(device)
        times.append(time.perf_counter() - started)
        losses.append(float(loss))
    record: dict[str, Any] = {
        "step_s_median": round(statistics.median(times), 4),
        "step_s_min": round(min(times), 4),
        "first_step_s": round(first, 1),
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "losses": [round(value, 6) for value in losses],
    }
    if stream is not None:
        record["stall_s"] = round(stream.stall_seconds() / config.bench.steps, 4)
    if device.type == "cuda":
        record["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        record["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    return record


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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
