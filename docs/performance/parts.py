"""What single parts of a save or a step take on a GPU; prints one JSON record.

parts.py copies START: 4 GiB from the device to host memory in several ways, in GiB/s; START (a Unix time) lets several
processes, one for each device, do the same at the same time. parts.py products: the base's product with the low-rank
one beside it, or added to it in place, in microseconds. parts.py update: steps of a full fine-tune of four layers with
the optimizer's state in host memory, and what of them each part of the update takes, in seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_train import config as configuration
from ltx_train.assembly import resolve, run_builder, timing, update_builder
from ltx_train.assembly.setup import settled
from ltx_train.distributed.ranks import process_group, ranks_from_environment
from ltx_train.memory.pinned import pinned
from ltx_train.memory.planning.cards import GIB
from ltx_train.model import presets
from ltx_train.updates.sliced_parameters import SlicedParameters


def copies(start: float) -> dict[str, float]:
    device = torch.device("cuda", 0)
    given = [torch.ones(GIB // 4, device=device) for _ in range(4)]
    torch.cuda.synchronize()
    starts = _starts(start)
    began = next(starts)
    fresh = [value.to("cpu", copy=True) for value in given]
    found = {"fresh": 4 / (time.perf_counter() - began)}
    began = next(starts)
    _copy(fresh, given)
    found["kept"] = 4 / (time.perf_counter() - began)
    began = next(starts)
    memory = [pinned(GIB, device) for _ in given]
    found["locking"] = 4 / (time.perf_counter() - began)
    began = next(starts)
    _copy([m.view(torch.float32) for m in memory], given)
    found["locked"] = 4 / (time.perf_counter() - began)
    return found


def _starts(first: float) -> Iterator[float]:
    while True:
        time.sleep(max(0.0, first - time.time()))
        yield time.perf_counter()
        first += 6


def _copy(to: list[Tensor], given: list[Tensor]) -> None:
    for target, value in zip(to, given, strict=True):
        target.copy_(value, non_blocking=True)
    torch.cuda.synchronize()


def products() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for rows, inputs, outputs in ((4184, 4096, 4096), (4184, 4096, 16384), (4184, 16384, 4096), (4184, 4096, 2048)):
        made = {"device": "cuda", "dtype": torch.bfloat16}
        x, weight = torch.randn(rows, inputs, **made), torch.randn(outputs, inputs, **made) * 0.02
        bias, inner, up = (torch.randn(*shape, **made) for shape in ((outputs,), (rows, 32), (outputs, 32)))
        wide_x, wide = torch.randn(rows, inputs + 64, **made), torch.randn(outputs, inputs + 64, **made)
        ways: dict[str, Callable[[], Any]] = {
            "base": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
            "beside": lambda x=x, w=weight, b=bias, h=inner, u=up: (F.linear(x, w, b), F.linear(h, u)),
            "in place": lambda x=x, w=weight, b=bias, h=inner, u=up: F.linear(h, u, b).addmm_(x, w.t()),
            "wider": lambda x=wide_x, w=wide, b=bias: F.linear(x, w, b),
        }
        found[f"{rows}x{inputs}x{outputs}"] = {name: _replayed(way) for name, way in ways.items()}
    return found


def _replayed(work: Callable[[], Any], times: int = 20) -> float:
    """Microseconds, as one CUDA graph of many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    taken: list[float] = []
    for _ in range(6):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        taken.append(before.elapsed_time(after) / times * 1e3)
    return sorted(taken)[2]


def update() -> dict[str, Any]:
    presets.PRESETS["ltx2_3_22b"] = replace(presets.PRESETS["ltx2_3_22b"], layers=4)
    config = configuration.compose_config([
        "experiment=voice_reference_22b", "model.weights=random", "adapter=full", "optim=adamw", "memory=recompute",
        "strategy=zero3_offload", "strategy.devices=1", "data.source=none", "data.root=none", "memory.graphs=false",
    ])  # fmt: skip
    ranks = ranks_from_environment(os.environ)
    spent, times = dict[str, float](), list[float]()
    with process_group(ranks, resolve.device(config, ranks), 600):
        setup = settled(config, ranks)
        transformer, updates = update_builder.open_for_training(setup)
        step = timing.random_steps(setup, run_builder.step_recipe(setup, transformer, updates))
        for number in range(7):
            if number == 4:
                for name in ("wait_for_gradients", "norm", "scale_gradients", "zero_gradients", "publish"):
                    _time(SlicedParameters, name, spent)
                _time(type(updates.optimizer), "step", spent)
            began = time.perf_counter()
            float(step(number))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return {"step_s": times, "spent_s": {name: seconds / 3 for name, seconds in spent.items()}}


def _time(owner: Any, name: str, spent: dict[str, float]) -> None:
    """From here on, calls of a method add to `spent`."""
    original = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = original(*given, **named)
        torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    parts: dict[str, Callable[..., Any]] = {"copies": copies, "products": products, "update": update}
    print(json.dumps(parts[sys.argv[1]](*map(float, sys.argv[2:]))))
