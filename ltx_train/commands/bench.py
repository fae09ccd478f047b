"""`ltx-train bench`: speed and memory of a training step on random latents, or the speed of reading, as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train import durable
from ltx_train.assembly import (
    data_speed,
    from_config,
    memory_plan,
    outputs,
    resolve,
    run_builder,
    summary,
    timing,
    update_builder,
)
from ltx_train.assembly.setup import Setup, settled
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit, Role, UserError
from ltx_train.data import index, store
from ltx_train.distributed.ranks import Ranks, process_group, ranks_from_environment
from ltx_train.memory.planning.cards import GIB, card_of_device
from ltx_train.memory.planning.duration import model_flops


def run(config: Config) -> int:
    """Prints one record, and appends it to the list in bench.out. Several devices step together, each in its own
    process (`jobs.processes`)."""
    if config.bench.what == "data":
        return _data(config)
    ranks = ranks_from_environment(os.environ)
    if config.bench.baseline and ranks.world > 1:
        raise UserError("bench.baseline=true compares one device: set strategy=single strategy.devices=1")
    roles = {role for _, mode in configuration.training_modes(config) for role in (mode.video, mode.audio)}
    if config.bench.baseline and Role.absent in roles:
        raise UserError("bench.baseline=true compares with diffusers, which always runs both modalities")
    outputs.check_output(config, "bench.out", config.bench.out)
    peer = _peer(config) if config.bench.baseline else {}
    with process_group(ranks, resolve.device(config, ranks), resolve.launch(config).rendezvous_timeout_s):
        return _run(config, ranks, peer)


def _data(config: Config) -> int:
    """Reading of samples. The folder must be on this machine: of a store the network would be measured."""
    if store.is_url(config.data.root):
        raise ConfigError(f"data.root={config.data.root}: bench.what=data reads a prepared folder on this machine")
    outputs.check_output(config, "bench.out", config.bench.out)
    root = from_config.data_folder(config)
    measured = data_speed.measure(root, index.load(root), workers=config.data.workers)
    _print({"case": config.bench.case, **measured}, config.bench.out)
    return Exit.DONE


def _run(config: Config, ranks: Ranks, peer: dict[str, Any]) -> int:
    setup = settled(config, ranks)
    started = time.perf_counter()
    transformer, updates = update_builder.open_for_training(setup)
    loaded = time.perf_counter() - started
    try:
        step = timing.random_steps(setup, run_builder.step_recipe(setup, transformer, updates))
        measured = timing.timed(setup, step, transformer)
    except torch.OutOfMemoryError as error:
        raise UserError(memory_plan.out_of_memory(setup.config, setup.plan)) from error
    measured |= _largest(measured, ranks)
    if ranks.leads:
        about = {**_about(config), "ranks": ranks.world, "load_s": round(loaded, 1)}
        _report(setup, {**about, **measured, **_rates(setup, measured["step_s_median"]), **peer})
    return Exit.DONE


def _largest(measured: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The largest memory figures over the ranks."""
    everyone = ranks.gather(measured)
    return {name: max(m[name] for m in everyone) for name in measured if name.endswith("_gib")}


def _report(setup: Setup, record: dict[str, Any]) -> None:
    if setup.plan is not None:
        record["memory"] = summary.describe(setup.plan)
        record["planned_gib"] = round(setup.plan.footprint.gib, 2)
        record["planned_step_s"] = round(setup.plan.footprint.step_s, 3)
    _print(record, setup.config.bench.out)


def _print(record: dict[str, Any], out: str | None) -> None:
    print(json.dumps(record))
    if out:
        _collect(Path(out), record)
        print(f"added to {out}", file=sys.stderr)


def _peer(config: Config) -> dict[str, Any]:
    """Measures the baseline in a separate process, whose memory is free again before the trainer is measured."""
    from ltx_train.assembly import baseline  # imports diffusers' pipelines, which only a comparison needs

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured = pool.submit(baseline.measure, config).result()
    peer = {f"peer_{name}": measured[name] for name in ("step_s_median", "peak_reserved_gib") if name in measured}
    quantize, _ = resolve.precision(config)
    quantized = "" if quantize == "none" else f", optimum-quanto {quantize}"
    return {"peer": f"diffusers model, eager, every block checkpointed{quantized}; same session", **peer}


def _rates(setup: Setup, seconds: float) -> dict[str, Any]:
    """Tokens per second, and the model's FLOP/s as a share of the card's dense bf16 rate (MFU)."""
    needed = memory_plan.need(setup.config)
    # Steps are timed on the first bucket, with all micro-batches of an optimizer step.
    work = resolve.workload_of(setup.config, resolve.buckets(setup.config)[0])
    passes = configuration.micro_batches(setup.config, setup.ranks.world)
    samples = setup.sharing.readers * work.batch * passes
    rates = {"tokens_per_s": round(samples * (work.video * work.sequence + work.audio) / seconds, 1)}
    if setup.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setup.device)
        card = card_of_device(properties.name, properties.total_memory / GIB)
        flops = passes * model_flops(needed.size, work, full=needed.trained.full)
        rates["mfu"] = round(flops / seconds / (card.bf16_tflops * 1e12), 4)
    return rates


def _about(config: Config) -> dict[str, Any]:
    head = ""
    if shutil.which("git"):
        # The commit of this package's checkout, whatever folder the command runs in; empty for an installed wheel.
        call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        head = subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "case": config.bench.case,
        "device": gpu,
        "torch": torch.__version__,
        "commit": head,
        "command": "ltx-train " + " ".join(sys.argv[1:]),
    }


def _collect(path: Path, record: dict[str, Any]) -> None:
    records = outputs.read_records(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, json.dumps([*records, record], indent=1) + "\n")
