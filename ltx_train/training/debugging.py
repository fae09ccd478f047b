"""Ways to look into a run: a profile of some steps, and deterministic kernels."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Steps that compile, record CUDA graphs and warm up come before the profiled ones.
_WAIT, _WARMUP = 3, 1


class StepProfiler:
    """torch's profiler over whole optimizer steps. `step` is called at the edge of each."""

    def __init__(self, profiler: Any) -> None:
        self._profiler = profiler

    def step(self) -> None:
        self._profiler.step()


@contextmanager
def profiled(folder: Path, rank: int, steps: int) -> Generator[StepProfiler | None]:
    """Writes `profile/rank-N.json`, a trace for chrome://tracing or Perfetto, and prints the most expensive operations.
    steps: 0 for no profile."""
    if not steps:
        yield None
        return
    path = folder / "profile" / f"rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(path))
        if rank == 0:
            print(profile.key_averages().table(sort_by=sort, row_limit=15), file=sys.stderr)
            print(f"ltx-train: the profile of up to {steps} steps is in {path}", file=sys.stderr)

    schedule = torch.profiler.schedule(wait=_WAIT, warmup=_WARMUP, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield StepProfiler(profile)


def use_deterministic_kernels() -> None:
    """torch's deterministic algorithms and plain attention. Attention's fused backward varies between equal runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
