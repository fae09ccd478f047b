"""`ltx-train doctor`: checks whether this machine can train, and names a fix for every problem."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from ltx_train.assembly import encoder_plan, from_config, memory_plan, model_source, resolve
from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import Exit, UserError
from ltx_train.data import store
from ltx_train.distributed.ranks import process_group, ranks_from_environment
from ltx_train.jobs import processes
from ltx_train.memory.planning.cards import GIB

_PROBE_BYTES = 256 * 2**20
# Longest duration of a save that a 30-second notice allows.
_NOTICE_S = 25.0
_MEETING_S = 60.0
_LIBRARIES = ("torch", "lightning", "diffusers", "peft", "transformers", "optimum-quanto", "bitsandbytes", "wandb")


@dataclass(frozen=True)
class Finding:
    """level: pass, warn or fail. fix: what the user can do, empty for a pass."""

    name: str
    level: str
    text: str
    fix: str = ""


def run(config: Config) -> int:
    """Prints all findings. Returns exit code 77 when one of them has level fail."""
    findings = [finding for check in _CHECKS for finding in _run_check(check, config)]
    if config.doctor.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _show(findings)
        close(
            None, "ltx-train prepare ..." if any(f.name == "data" and f.fix for f in findings) else "ltx-train fit ..."
        )
    return Exit.CONFIG if any(finding.level == "fail" for finding in findings) else Exit.DONE


def _run_check(check: Callable[[Config], Iterator[Finding]], config: Config) -> Iterator[Finding]:
    """Yields the findings of a check. An error in the check is a finding too."""
    try:
        yield from check(config)
    except (UserError, OSError, RuntimeError, ImportError) as error:
        yield Finding(check.__name__.strip("_"), "fail", str(error).splitlines()[0], "see the message")


def _libraries(_config: Config) -> Iterator[Finding]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    yield Finding("libraries", "pass", ", ".join(f"{k} {v}" for k, v in versions.items()))


def _gpus(_config: Config) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        fix = "check the driver (nvidia-smi), or set strategy.device=cpu for the tiny model"
        yield Finding("gpu", "warn", f"no GPU is visible to torch {torch.__version__}", fix)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        busy = free < 0.9 * total
        text = f"{number}: {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
        text += f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        yield Finding("gpu", "warn" if busy else "pass", text, "another process uses it: nvidia-smi" if busy else "")
    yield from _links()


def _links() -> Iterator[Finding]:
    """Host-to-device bandwidth, which limits streaming, and direct access between devices."""
    size = _PROBE_BYTES
    host, gpu = torch.empty(size, dtype=torch.uint8).pin_memory(), torch.empty(size, dtype=torch.uint8, device="cuda")
    gpu.copy_(host)
    torch.cuda.synchronize()
    started = time.perf_counter()
    gpu.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    speed = size / (time.perf_counter() - started) / 1e9
    slow = speed < 10
    fix = "streamed weights will be slow: check the slot's width (nvidia-smi -q -d PCI)" if slow else ""
    yield Finding("host link", "warn" if slow else "pass", f"{speed:.0f} GB/s from pinned memory", fix)
    count = torch.cuda.device_count()
    apart = [(a, b) for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if count > 1:
        text = (
            f"{len(apart)} pairs of devices have no direct access" if apart else "all devices reach each other directly"
        )
        yield Finding("peers", "warn" if apart else "pass", text, "gradients travel through the host" if apart else "")


def _ranks(config: Config) -> Iterator[Finding]:
    """Whether the processes of a run on several devices can connect, and how long an all-reduce of 64 MiB takes."""
    count = resolve.launch(config).processes
    if count == 1:
        return
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        code = processes.run_processes(partial(_all_reduce, answer), config, count)
        if code != 0 or not answer.is_file():
            fix = "the error is above; NCCL_DEBUG=INFO makes NCCL print more"
            yield Finding("all-reduce", "fail", f"{count} processes did not complete an all-reduce", fix)
            return
        yield Finding("all-reduce", "pass", f"{count} processes: {answer.read_text()}")


def _all_reduce(answer: Path, config: Config) -> int:
    """Runs in every process: times an all-reduce. Rank 0 writes the result to `answer`."""
    ranks = ranks_from_environment(os.environ)
    device = resolve.device(config, ranks)
    with process_group(ranks, device, _MEETING_S):
        exchange, seconds = ranks.exchange(), list[float]()
        for _ in range(3):
            values = torch.full((_PROBE_BYTES // 16,), float(ranks.rank + 1), device=device)
            ranks.any(False)
            started = time.perf_counter()
            exchange.all_reduce(values)
            total = float(values[-1])
            seconds.append(time.perf_counter() - started)
            if total != ranks.world * (ranks.world + 1) / 2:
                raise UserError(f"rank {ranks.rank}: an all-reduce over {ranks.world} processes gave {total:g}")
        if ranks.leads:
            answer.write_text(f"64 MiB in {1000 * min(seconds):.1f} ms")
    return Exit.DONE


def _memory(_config: Config) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GIB:.1f} GiB"
    low = torch.cuda.is_available() and limit != resource.RLIM_INFINITY and limit < 20 * GIB and os.getuid() != 0
    fix = "streamed weights are page-locked: raise `ulimit -l`" if low else ""
    yield Finding("host memory", "warn" if low else "pass", f"{total:.0f} GiB; limit of locked memory: {text}", fix)


def _plan(config: Config) -> Iterator[Finding]:
    if not config.data.buckets:
        return
    room = memory_plan.here(config)
    if room is None:
        return
    plan = memory_plan.plan_for(config, room)
    if plan is None:
        yield Finding(
            "plan", "fail", memory_plan.refusal(config, room).splitlines()[0], "ltx-train plan names three ways"
        )
    else:
        foot = plan.footprint
        yield Finding(
            "plan", "pass", f"needs {foot.gib:.1f} of {room.budget_gib:.1f} GiB, about {foot.step_s:.2f} s a step"
        )


def _encoders(config: Config) -> Iterator[Finding]:
    """Whether `prepare` and the decoders of `sample` and of generated clips fit, and how."""
    device = resolve.device(config)
    if not config.data.buckets or (device.type != "cuda" and resolve.budget_gib(config) is None):
        return
    memory, room = encoder_plan.here(config, device), memory_plan.here(config)
    assert room is not None
    fits = max(memory.prepare_gib, memory.decode_gib) <= room.budget_gib
    text = encoder_plan.description(memory, has_text=config.model.text_encoder is not None)
    text += f" of {room.budget_gib:.1f} GiB"
    yield Finding("encoders", "pass" if fits else "fail", text, "" if fits else "take smaller or shorter data.buckets")


def _disk(config: Config) -> Iterator[Finding]:
    """Whether the disk has space for the kept checkpoints, and how long a save takes on it."""
    root = from_config.run_dir(config)
    while not root.exists():
        root = root.parent
    trained = memory_plan.need(config).trained
    save = trained.parameters * resolve.optimizer(config).saved_bytes
    free, needed = shutil.disk_usage(root).free, save * (config.checkpoint.keep + 1)
    short = free < needed
    fix = "free some space, lower checkpoint.keep or set run.root" if short else ""
    text = f"{free / GIB:.0f} GiB free in {root}, {needed / GIB:.1f} needed for {config.checkpoint.keep} checkpoints"
    yield Finding("disk space", "fail" if short else "pass", text, fix)
    speed = _write_speed(root, min(_PROBE_BYTES, free // 4))
    seconds = save / speed
    text = f"{speed / 1e6:.0f} MB/s written and flushed: a save of {save / GIB:.2f} GiB takes {seconds:.1f} s"
    fix = _save_advice(config, seconds)
    yield Finding("disk speed", "warn" if fix else "pass", text, fix)


def _save_advice(config: Config, seconds: float) -> str:
    """Advice for saves that take `seconds`, empty when they are fast enough."""
    room = memory_plan.here(config) if config.data.buckets else None
    plan = None if room is None else memory_plan.plan_for(config, room)
    step_s = 0.0 if plan is None else plan.footprint.step_s
    if step_s and seconds > config.checkpoint.interval * step_s:
        least = math.ceil(seconds / step_s)
        return f"training would wait for every save: checkpoint.interval={least} or more, or a faster disk"
    return "a notice of 30 s is too short for it: what counts is checkpoint.interval" if seconds > _NOTICE_S else ""


def _write_speed(folder: Path, size: int) -> float:
    """Measures bytes per second, including the flush."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(size, len(block)) / (time.perf_counter() - started)


def _weights(config: Config) -> Iterator[Finding]:
    if config.model.weights == "random":
        yield Finding("weights", "warn", "model.weights=random: for trials only", "set model.path for a real run")
    elif config.model.path is None:
        yield Finding("weights", "warn", "model.path is not set", "give the single-file checkpoint")
    else:
        source = model_source.weights(config)
        name = source.config["transformer"]["num_layers"]
        yield Finding(
            "weights", "pass", f"{config.model.path}: {name} blocks, fingerprint {source.fingerprint('')[:16]}"
        )


def _data(config: Config) -> Iterator[Finding]:
    if not config.data.root or not (store.is_url(config.data.root) or Path(config.data.root).is_dir()):
        yield Finding("data", "warn", f"nothing is prepared in {config.data.root!r}", "ltx-train prepare")
        return
    _, index, stale = from_config.prepared(config)
    fix = "ltx-train prepare" if stale else ""
    yield Finding(
        "data",
        "warn" if stale else "pass",
        stale[0] if stale else f"{len(index.records)} clips in {config.data.root}",
        fix,
    )


def _tracker(config: Config) -> Iterator[Finding]:
    if config.logger.wandb != "online":
        yield Finding("tracker", "pass", f"W&B {config.logger.wandb}: needs no network")
        return
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
        yield Finding("tracker", "pass", f"{host} answers")
    except OSError as error:
        yield Finding(
            "tracker", "warn", f"{host} does not answer ({error})", "the run records offline; wandb sync later"
        )


def _cluster(_config: Config) -> Iterator[Finding]:
    sbatch = shutil.which("sbatch")
    text = f"SLURM: {sbatch}" if sbatch else "no SLURM here"
    yield Finding("cluster", "pass", text)
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield Finding("ports", "pass", f"processes can listen (tried {probe.getsockname()[1]})")


_CHECKS = (_libraries, _gpus, _ranks, _memory, _weights, _data, _encoders, _plan, _disk, _tracker, _cluster)
_MARKS = {"pass": "[green]pass[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


def _show(findings: list[Finding]) -> None:
    console = Console(soft_wrap=True)
    for finding in findings:
        fix = f"\n     {'':<12}-> {finding.fix}" if finding.fix else ""
        console.print(f"{_MARKS[finding.level]} {finding.name:<12}{escape(finding.text)}{escape(fix)}", highlight=False)
