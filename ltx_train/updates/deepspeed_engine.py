"""DeepSpeed's ZeRO over a transformer: how its engine is made, and `Updates` over it.

Owns DeepSpeed's configuration and every access to its internals: where its optimizers keep the flat slices of masters
and moments. DeepSpeed reduces, clips and updates by itself; checkpoints stay this project's own.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltx_train.contracts import ConfigError
from ltx_train.distributed.exchange import Exchange
from ltx_train.memory.weights.flat_blocks import FlatBlocks
from ltx_train.model import adapter
from ltx_train.model.transformer import Block, Transformer
from ltx_train.updates import slice_files
from ltx_train.updates.protocol import TrainedState
from ltx_train.updates.slice_files import MOMENTS
from ltx_train.updates.unit_slices import Place, UnitSlice, UnitSlices

# Elements that are reduced and gathered at a time; a block of the 22B model has 3.9e8, and twice as many bytes.
_BUCKET = int(4.2e8)
# Largest parameter, in elements, that ZeRO-3 keeps whole on every rank. A full fine-tune keeps the vectors outside the
# blocks whole; an adapter run keeps the flat adapter of each block whole.
_WHOLE_VECTORS, _WHOLE_ADAPTERS = 100_000, 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """stage: ZeRO stage of the trained weights; at 3 the frozen ones are sliced too. full: every weight is trained,
    otherwise blocks are flat bytes (`memory.weights.flat_blocks`). dtype: that the trained weights have in the model.
    clip: gradient norm, 0: no clipping. offload: None, `cpu` or a folder on a fast disk. hpz: ranks of a machine that
    keep a second slice of all weights, so that backward gathers within it; 1: none. extra: the user's own settings,
    merged over all others."""

    stage: int
    full: bool
    dtype: torch.dtype
    clip: float
    offload: str | None
    hpz: int
    extra: Mapping[str, Any]


def configuration(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The gradients of an adapter are small: reducing them on a stream of their own costs more than it hides (1.23 instead
    of 1.09 s a step on two H200s).
    """
    overlapped = settings.full and settings.stage > 1 and settings.offload is None
    zero: dict[str, Any] = {
        "stage": settings.stage, "contiguous_gradients": True, "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET, "overlap_comm": overlapped,
    }  # fmt: skip
    if settings.stage == 3:
        ahead = _BUCKET if settings.full else 2 * _BUCKET
        zero |= {
            "stage3_prefetch_bucket_size": ahead, "stage3_max_live_parameters": 4 * ahead,
            "stage3_max_reuse_distance": 2 * ahead,
            "stage3_param_persistence_threshold": _WHOLE_VECTORS if settings.full else _WHOLE_ADAPTERS,
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
    transformer: Transformer, optimizer: torch.optim.Optimizer, settings: EngineSettings, device: torch.device
) -> Any:
    """DeepSpeed's engine around the transformer. The process group of several ranks exists already."""
    deepspeed = _import_for(device)
    if settings.stage == 3:
        # Hooks per block instead of per layer: a block's weights are gathered and released together.
        deepspeed.utils.set_z3_leaf_modules(transformer, [Block])
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    try:
        engine, *_ = deepspeed.initialize(
            model=transformer, model_parameters=trained, optimizer=optimizer, config=configuration(settings),
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
        raise ConfigError(f"strategy=deepspeed_*: deepspeed cannot be imported ({error})") from error
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


def own_slice(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter between passes."""
    return getattr(parameter, "ds_tensor", parameter)


class DeepSpeedUpdates:
    """`Updates` by DeepSpeed's engine.

    parameters, shapes: of everything that is trained, by name, in the order in which a single process numbers it.
    flat: blocks whose trained tensors lie in flat parameters (stage 3). saves_slices: every rank saves its slice;
    otherwise the leading rank saves the whole state.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], *,
        flat: FlatBlocks | None, stage: int, exchange: Exchange, saves_slices: bool,
    ) -> None:  # fmt: skip
        self.engine, self._zero = engine, engine.optimizer
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        self._parameters, self._shapes, self._flat, self._stage = parameters, shapes, flat, stage
        self._exchange, self._saves_slices = exchange, saves_slices
        names = {id(parameter): name for name, parameter in parameters.items()}
        # What lies in each parameter that the engine sees.
        contents = {} if flat is None else flat.contents()
        self._contents = {
            id(whole): [Place(name=names[id(p.parameter)], start=p.start, shape=p.shape) for p in places]
            for whole, places in contents.items()
        } | {id(p): [Place(name=name, start=0, shape=shapes[name])] for name, p in parameters.items()}

    @property
    def accumulating(self) -> list[nn.Parameter]:
        return []

    def end_pass(self) -> None:
        """The engine's hooks have reduced the gradients."""

    def average(self) -> None:
        """`step` does it."""

    def norms(self) -> dict[str, Tensor]:
        return {}

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        """The engine skips a step whose gradient is not finite, and reports an infinite norm for it. It knows no
        `limit`, so the configuration refuses `optim.skip_spikes`."""
        self._zero.clip_grad = clip
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float("inf") if norm is None or self._zero.overflow else norm)

    def sizes(self) -> Mapping[str, int]:
        return {name: shape.numel() for name, shape in self._shapes.items()}

    def whole(self) -> AbstractContextManager[Any]:
        if self._stage < 3:
            return nullcontext()
        return self._gathered()

    @contextmanager
    def _gathered(self) -> Generator[None]:
        assert self._flat is not None
        visible = [p for p in self.engine.module.parameters() if p.requires_grad]
        with importlib.import_module("deepspeed").zero.GatheredParameters(visible):
            self._flat.bind_trained()
            yield
            self._flat.release_trained()

    def state(self) -> TrainedState:
        slices = self._slices()
        return slices.own() if self._saves_slices else slices.gathered()

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        slices, saved = self._slices(), optimizer["state"]
        expected = {place.name: place.shape for unit in slices.units.values() for place in unit.places}
        adapter.refuse_misfit(expected, slice_files.shapes(weights))
        slices.fill_masters(weights)
        if saved:
            moments = {name: slices.saved_moments(name, saved) for name in slices.units}
            for flat, names in self._flat_masters():
                values = {kind: torch.cat([moments[name][kind] for name in names]) for kind in MOMENTS}
                place = flat.device if self.optimizer.param_groups[0].get("fused") else "cpu"
                steps = torch.as_tensor(saved[0]["step"], dtype=torch.float32).to(place, copy=True)
                self.optimizer.state[flat] = {**values, "step": steps}
        self._publish(weights)

    def _publish(self, weights: Mapping[str, Tensor]) -> None:
        """Masters become the weights that the model computes with."""
        if self._stage < 3:
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
            return
        for group, flat in zip(
            self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat, strict=True
        ):
            group.copy_(flat)
        persistent = self._zero.persistent_parameters
        if persistent:
            # Weights too small to be sliced are whole on every rank.
            persistent[0].all_gather(persistent)

    def _slices(self) -> UnitSlices:
        units: dict[str, UnitSlice] = {}
        steps: float | None = None
        for flat, places in zip((flat for flat, _ in self._flat_masters()), self._places(), strict=True):
            state = self.optimizer.state.get(flat, {})
            steps = float(state["step"]) if "step" in state else None
            for name, (start, length, within) in places.items():
                units[name] = UnitSlice(
                    places=within, master=flat.detach()[start : start + length],
                    moments={kind: state[kind][start : start + length] for kind in MOMENTS if kind in state},
                )  # fmt: skip
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if not k.startswith("_ds")}
        return UnitSlices(units=units, exchange=self._exchange, order=list(self._parameters), group=group, steps=steps)

    def _flat_masters(self) -> list[tuple[Tensor, list[str]]]:
        """This rank's flat masters, and the units in each."""
        masters: Sequence[Tensor] = (
            self._zero.single_partition_of_fp32_groups if self._stage < 3 else self._zero.fp32_partitioned_groups_flat
        )
        return [(flat, list(places)) for flat, places in zip(masters, self._places(), strict=True)]

    def _places(self) -> list[dict[str, tuple[int, int, list[Place]]]]:
        """By flat master: its units, and for each where it begins in the flat master, how long it is, and its
        parameters.

        Up to stage 2 a group of parameters is one flat tensor that is cut into equal parts: one unit. At stage 3 every
        parameter that the engine sees is cut by itself: a unit each, named after the first tensor in it.
        """
        zero = self._zero
        groups: list[dict[str, tuple[int, int, list[Place]]]] = []
        if self._stage < 3:
            every = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
            for number, (parameters, offsets) in enumerate(every):
                within = [
                    replace(place, start=offset)
                    for parameter, offset in zip(parameters, offsets, strict=True)
                    for place in self._contents[id(parameter)]
                ]
                length = zero.single_partition_of_fp32_groups[number].numel()
                groups.append({f"group.{number}": (0, length, within)})
            return groups
        for parameters in zero.fp16_groups:
            start, units = 0, dict[str, tuple[int, int, list[Place]]]()
            for parameter in parameters:
                length, within = parameter.partition_numel(), self._contents[id(parameter)]
                units[within[0].name] = (start, length, within)
                start += length
            groups.append(units)
        return groups


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` over `base`, nested."""
    merged = dict(base)
    for name, value in more.items():
        own = merged.get(name)
        merged[name] = _merged(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return merged
