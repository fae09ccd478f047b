"""DeepSpeed's engine: how it is configured, imported and made.

DeepSpeed reduces, clips and updates. What it holds is read and filled by `deepspeed_state`; when it acts within an
optimizer step is decided in `deepspeed_updates`.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ltx_train.contracts import ConfigError
from ltx_train.model.transformer import Block

# Elements that are reduced and gathered at a time; a block of the 22B model has 3.9e8, and twice as many bytes.
_BUCKET = int(4.2e8)
# The same for an adapter.
_ADAPTER_BUCKET = int(3.2e7)
# Largest parameter, in elements, that ZeRO-3 keeps whole on every rank: the vectors outside the blocks.
_WHOLE_VECTORS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """stage: ZeRO stage of the trained weights. full: every weight is trained. dtype: that the trained weights have in
    the model. clip: gradient norm, 0: no clipping. offload: None, `cpu` or a folder on a fast disk. hpz: ranks of a
    machine that keep a second slice of all weights, so that backward gathers within it; 1: none. extra: the user's own
    settings, merged over all others."""

    stage: int
    full: bool
    dtype: torch.dtype
    clip: float
    offload: str | None
    hpz: int
    extra: Mapping[str, Any]


def configuration(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    bucket = _BUCKET if settings.full else _ADAPTER_BUCKET
    zero: dict[str, Any] = {
        "stage": settings.stage, "contiguous_gradients": True, "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # An adapter's gradients arrive all at once, behind the pass: there is nothing to overlap with.
        "overlap_comm": settings.full and settings.stage > 1 and settings.offload is None,
    }  # fmt: skip
    if settings.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 4 * bucket,
            "stage3_max_reuse_distance": 2 * bucket, "stage3_param_persistence_threshold": _WHOLE_VECTORS,
            "sub_group_size": 1_000_000_000, "zero_hpz_partition_size": settings.hpz,
            # True would replace torch.nn.functional.linear for the whole process, with other numbers.
            "memory_efficient_linear": False,
        }  # fmt: skip
    if settings.offload is not None:
        at = {"device": "cpu"} if settings.offload == "cpu" else {"device": "nvme", "nvme_path": settings.offload}
        zero["offload_optimizer"] = {**at, "pin_memory": torch.cuda.is_available()}
    made = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": settings.clip,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"},
        # Passes accumulate, and `step` ends an optimizer step, however many passes it had. DeepSpeed can overlap
        # reductions so under stage 2 alone; under stage 3 every pass reduces, which comes to the same.
        "managed_gradient_accumulation": settings.stage == 3 and settings.offload is None,
    }  # fmt: skip
    if settings.dtype == torch.bfloat16:
        made["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return _merged(made, settings.extra)


def open_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings, device: torch.device
) -> Any:
    """DeepSpeed's engine around a module. The process group of several ranks exists already."""
    deepspeed = _import_for(device)
    if settings.offload not in (None, "cpu"):
        # The file access that DeepSpeed compiles has no kernels, but its builder fails at architectures such as 10.0a.
        os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    if settings.stage == 3:
        # Hooks per block instead of per layer: a block's weights are gathered and released together.
        deepspeed.utils.set_z3_leaf_modules(module, [Block], raise_if_not_found=False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=trained, optimizer=optimizer, config=configuration(settings),
            dist_init_required=False,
        )  # fmt: skip
    except (ValueError, AssertionError, KeyError) as error:
        if not settings.extra:
            raise
        raise ConfigError(f"strategy.deepspeed: DeepSpeed refuses the settings ({error})") from error
    return engine


def _import_for(device: torch.device) -> Any:
    # Without it DeepSpeed looks for devices by itself, and takes a GPU that the run must not use.
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(f"DeepSpeed is the engine of this run, and cannot be imported ({error})") from error
    if device.type != "cuda":
        # It would compile its own all-reduce for CPUs, for which most machines have no compiler.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Read where an engine is made, and set by no launcher of a single process nor by srun.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)
    deepspeed.init_distributed(backend, dist_init_required=False)
    return deepspeed


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` over `base`, nested."""
    merged = dict(base)
    for name, value in more.items():
        own = merged.get(name)
        merged[name] = _merged(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return merged
