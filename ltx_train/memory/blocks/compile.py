"""Compilation of blocks: one static graph per bucket and way of keeping, cached across restarts.

Owns the compiler's settings. All blocks share a graph, because their weights are its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

# Graphs per function: buckets x batch sizes x (training, validation, each modality absent).
_MOST_GRAPHS = 64
_WIDEST_ROW = 4096
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# What the compiler puts around every recomputed attention. torch caches graphs with it from 2.13 on.
_RECOMPUTED = "torch.ops.higher_order.graphsafe_run_with_rng_state"


def compiled_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(block, ...)` compiled for each shape it meets; a graph break is an error, not a slow run."""
    keep_cache()
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    torch._inductor.config.inductor_choices_class = kernel_choices
    torch._inductor.config.unsafe_marked_cacheable_functions = {
        **torch._inductor.config.unsafe_marked_cacheable_functions, _RECOMPUTED: "as in torch 2.13",
    }  # fmt: skip
    return torch.compile(call, fullgraph=True, dynamic=False)


def kernel_choices() -> Any:
    """The compiler's own choices of kernels, but that rows as wide as the model are reduced in registers instead of
    being read twice (torch stops at 1024)."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        def uuid(self) -> str:
            return f"rows up to {_WIDEST_ROW}"

        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            inner = features.get_reduction_hint() is ReductionHint.INNER and not cooperative_reduction
            return inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, _WIDEST_ROW)

    return Choices()


def keep_cache() -> None:
    """Compiled kernels go to the user's cache folder: torch's default is /tmp, which a restarted machine has lost.

    torch writes its default into the environment as soon as it looks for it, so that counts as unset.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.environ.get(_VARIABLE) in (None, default_cache_dir()):
        folder = root / "ltx-train" / "compiled"
        with suppress(OSError):  # a home that cannot be written to: torch's default remains
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[_VARIABLE] = str(folder)


def graphs() -> int:
    """Graphs compiled so far in this process; constant after each bucket has been seen once."""
    return int(counters["stats"]["unique_graphs"])
