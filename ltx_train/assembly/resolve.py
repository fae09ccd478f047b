"""Decides once what the raw settings mean: turns configuration, ranks and device into a few frozen objects.

The only place outside `config` that reads `strategy.*`, `memory.*` and `adapter.kind`; a test holds the others to it.
Everything below gets the objects. Importing this module imports no torch, because the process that starts the
processes of a run reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ltx_train import config as configuration
from ltx_train.config import Config, counted_fps, parse_bucket
from ltx_train.config.rules import STORED_AS
from ltx_train.contracts import ConfigError, ModalityName, Mode, Role, UserError
from ltx_train.diffusion.grid import Bucket, audio_latents
from ltx_train.distributed.strategies import DEEPSPEED, STRATEGIES
from ltx_train.updates.kinds import OPTIMIZERS, OptimizerKind

if TYPE_CHECKING:
    import torch

    from ltx_train.distributed.ranks import Ranks
    from ltx_train.memory.planning.search import PlanConstraints
    from ltx_train.memory.planning.sizes import MemoryChoice, Workload
    from ltx_train.updates.deepspeed_engine import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the processes of this machine are started. device: auto, cpu or cuda. Timeouts of 0 are off."""

    processes: int
    device: str
    start_timeout_s: float
    step_timeout_s: float

    @property
    def rendezvous_timeout_s(self) -> float:
        return self.start_timeout_s or 86400


def launch(config: Config) -> Launch:
    strategy = config.strategy
    return Launch(
        processes=strategy.devices, device=strategy.device, start_timeout_s=strategy.start_timeout_s,
        step_timeout_s=strategy.step_timeout_s,
    )  # fmt: skip


def machines(config: Config, world: int) -> int:
    """Machines of a run of `world` processes."""
    return max(1, world // config.strategy.devices)


def spans_machines(config: Config) -> bool:
    """Whether the run may go on several machines."""
    return STRATEGIES[config.strategy.name].several


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What the ranks of a run share, and what each holds a slice of.

    world: ranks of the run; local_world: of each machine. sequence: ranks that share each sample's video tokens.
    full: every weight is trained, otherwise an adapter. update_stage: ZeRO stage of the trained weights, 0 when every
    rank updates all of them. slices_blocks: the blocks' weights are sliced and gathered for each pass (ZeRO-3).
    offload: where a sliced optimizer state lives if not on the device: `cpu`, or a folder. engine: whose ZeRO it is.
    hpz: ranks that keep a second slice of all weights under DeepSpeed's ZeRO-3, 1: none.
    """

    name: str
    engine: str
    world: int
    local_world: int
    sequence: int
    full: bool
    update_stage: int
    slices_blocks: bool
    offload: str | None
    hpz: int

    @property
    def slices_updates(self) -> bool:
        """Whether each rank updates a slice of the trained weights."""
        return self.update_stage > 0

    @property
    def by_deepspeed(self) -> bool:
        return self.engine == DEEPSPEED

    @property
    def hooks_passes(self) -> bool:
        """Whether DeepSpeed's hooks work inside the passes. The gradients of an adapter are handed over behind them."""
        return self.by_deepspeed and self.full

    @property
    def streams_slices(self) -> bool:
        """Whether the weight stream gathers blocks that are sliced over the devices of a machine."""
        return self.slices_blocks and not self.hooks_passes

    @property
    def gathers_blocks(self) -> bool:
        """Whether the weight stream gathers blocks over several ranks."""
        return self.streams_slices and self.local_world > 1

    @property
    def saves_slices(self) -> bool:
        """Whether every rank writes its slice of a checkpoint. The state of an adapter is small: one rank writes it."""
        return self.slices_updates and self.full

    @property
    def reduces_in_backward(self) -> bool:
        """Whether a block's gradients are summed over the ranks as soon as its backward has ended."""
        return self.full and self.update_stage > 1

    @property
    def lockstep(self) -> bool:
        """Whether ranks communicate within a pass, so that all of them must run the same passes."""
        return self.update_stage >= 2 or self.slices_blocks or self.by_deepspeed

    @property
    def measures_together(self) -> bool:
        """Whether ranks communicate within a forward pass, so that all of them must run equally many."""
        return self.slices_blocks or self.sequence > 1

    @property
    def readers(self) -> int:
        """Ranks that read different samples."""
        return self.world // self.sequence

    def reader(self, rank: int) -> int:
        return rank // self.sequence

    @property
    def block_slices(self) -> int:
        """Over how many devices the blocks are sliced, 1 where they are not. The own stream slices within a machine."""
        if not self.slices_blocks:
            return 1
        return self.local_world if self.streams_slices else self.world

    @property
    def update_slices(self) -> int:
        """Over how many devices the updates are sliced, 1 where they are not."""
        return self.world if self.slices_updates else 1


def sharing(config: Config, ranks: Ranks | None = None, *, on_machines: int = 1) -> Sharing:
    """ranks: of the running processes; None before they are started, when `on_machines` with strategy.devices each
    are reckoned with. ConfigError when the ranks do not make whole sequence groups or the engine cannot span the
    machines, UserError when several processes run a strategy for one."""
    strategy, kind, full = config.strategy, STRATEGIES[config.strategy.name], trains_all_weights(config)
    world = strategy.devices * on_machines if ranks is None else ranks.world
    spanned = machines(config, world)
    if world > 1 and not kind.several:
        several = ", ".join(k.name for k in STRATEGIES.values() if k.several)
        raise UserError(f"{world} processes were started, but strategy={kind.name}: set strategy to one of {several}")
    if ranks is not None and world > 1:
        configuration.readers(config, world)
    configuration.validate_engine(config, spanned)
    engine = kind.engine(strategy.engine, spanned)
    return Sharing(
        name=kind.name, engine=engine, world=world, local_world=strategy.devices, sequence=strategy.sequence,
        full=full, update_stage=kind.update_stage(full=full, engine=engine), slices_blocks=kind.slices_frozen_blocks,
        offload=strategy.offload, hpz=strategy.hpz or (strategy.devices if spanned > 1 else 1),
    )  # fmt: skip


def engine_settings(config: Config, shared: Sharing) -> EngineSettings:
    """DeepSpeed's part of the configuration. Adapters are trained in float32 whatever the model's dtype."""
    import torch

    from ltx_train.updates.deepspeed_engine import EngineSettings

    halved = shared.full and config.model.dtype == "bfloat16"
    return EngineSettings(
        stage=shared.update_stage, full=shared.full, dtype=torch.bfloat16 if halved else torch.float32,
        clip=config.optim.clip, offload=shared.offload, hpz=shared.hpz, extra=dict(config.strategy.deepspeed),
    )  # fmt: skip


def trains_all_weights(config: Config) -> bool:
    """Full fine-tune or adapter."""
    return config.adapter.kind == "full"


def trained_kind(config: Config) -> str:
    """`lora` or `full`, for names of files and reports."""
    return config.adapter.kind


def for_one_process(config: Config) -> Config:
    """The configuration for a command that runs in one process. The strategy's name stays, and with it its
    arithmetic."""
    return replace(config, strategy=replace(config.strategy, sequence=1, devices=1))


def with_strategy_of(config: Config, other: Config) -> Config:
    """The configuration with another one's strategy."""
    strategy = replace(config.strategy, name=other.strategy.name, engine=other.strategy.engine)
    return replace(config, strategy=strategy)


def for_job(config: Config, nodes: int, devices: int) -> Config:
    """The configuration that a cluster job's processes read: one process for each device of a node.

    ConfigError when the job would be refused on the cluster.
    """
    if config.strategy.devices not in (1, devices):
        raise ConfigError(
            f"strategy.devices={config.strategy.devices}, but cluster.devices={devices}: a job has cluster.devices "
            "processes on each node, so set that alone"
        )
    several = nodes * devices > 1 and not STRATEGIES[config.strategy.name].several
    name = "ddp" if several else config.strategy.name
    job = configuration.changed(config, {"strategy.name": name, "strategy.devices": devices})
    configuration.validate_engine(job, nodes)
    return job


def device(config: Config, ranks: Ranks | None = None) -> torch.device:
    """The device to compute on; UserError when the settings need a GPU and there is none. It changes nothing: the
    process group makes a rank's device the current one."""
    import torch

    kind = config.strategy.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("strategy.device=cuda, but no GPU is visible: set strategy.device=cpu or check the driver")
    if kind != "cuda":
        return torch.device(kind)
    if ranks is None or ranks.world == 1:
        return torch.device("cuda", torch.cuda.current_device())
    if ranks.local >= torch.cuda.device_count():
        raise UserError(f"process {ranks.local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    return torch.device("cuda", ranks.local)


def optimizer(config: Config) -> OptimizerKind:
    return OPTIMIZERS[config.optim.name]


def buckets(config: Config) -> list[Bucket]:
    return [parse_bucket(text) for text in config.data.buckets]


def workload(config: Config) -> Workload:
    """The bucket with the most tokens, references included, as one micro-batch."""
    loads = (workload_of(config, bucket) for bucket in buckets(config))
    return max(loads, key=lambda load: (load.video, load.audio))


def workload_of(config: Config, bucket: Bucket) -> Workload:
    """One micro-batch of a bucket, references included."""
    from ltx_train.memory.planning.sizes import Workload

    modes, shared = [m for _, m in configuration.training_modes(config)], sharing(config)
    voice = audio_latents(config.data.reference_s)
    video = max(tokens_in_mode(m, ModalityName.video, bucket.video_tokens, bucket.video_tokens) for m in modes)
    audio = max(tokens_in_mode(m, ModalityName.audio, bucket.audio_tokens(counted_fps(config)), voice) for m in modes)
    # Alone, a full fine-tune computes with its float32 masters.
    halved = config.model.dtype == "bfloat16" and (not shared.full or shared.slices_updates)
    return Workload(
        batch=config.optim.batch_size, video=-(-video // shared.sequence), audio=audio, text=config.model.text_tokens,
        dtype_bytes=2 if halved else 4, sequence=shared.sequence,
    )  # fmt: skip


def tokens_in_mode(mode: Mode, stream: ModalityName, target: int, reference: int) -> int:
    """Tokens of a modality in a mode, its references included. reference: tokens of a reference at full scale; one is
    counted as large as its target where the configuration does not say its scale."""
    if mode.role(stream) is Role.absent:
        return 0
    scales = [(c.spatial_scale or 1) ** 2 * (c.temporal_scale or 1) for c in mode.references if c.stream is stream]
    return target + sum(reference // scale for scale in scales)


def plan_constraints(config: Config, host_gib: float | None) -> PlanConstraints:
    """What the configuration leaves to the memory plan. Explicit settings are single options."""
    from ltx_train.memory.blocks.keep import Keep
    from ltx_train.memory.planning.search import PlanConstraints

    memory = config.memory
    quantize = (memory.quantize,)
    if memory.quantize == "auto":
        quantize = ("none", STORED_AS.get(memory.compute, "int8"))
    return PlanConstraints(
        quantize=quantize, compute=memory.compute, keep=None if memory.keep is None else Keep(memory.keep),
        keep_everything=memory.keep_everything, stream_blocks=memory.stream_blocks, stream_slots=memory.stream_slots,
        offload_inputs=memory.offload_inputs, graphs=memory.graphs, compiled=memory.compile != "off", host_gib=host_gib,
    )  # fmt: skip


def memory_choice(config: Config) -> MemoryChoice:
    """The memory settings, with the plain way where they are open: nothing is traded but recomputation."""
    from ltx_train.memory.blocks.keep import Keep
    from ltx_train.memory.planning.sizes import MemoryChoice

    memory = config.memory
    return MemoryChoice(
        quantize="none" if memory.quantize == "auto" else memory.quantize, compute=memory.compute,
        keep=Keep(memory.keep or "inputs"), keep_everything=memory.keep_everything or 0,
        stream_blocks=memory.stream_blocks or 0, stream_slots=memory.stream_slots,
        offload_inputs=memory.offload_inputs or False, graphs=memory.graphs or False,
        compiled=memory.compile != "off",
    )  # fmt: skip


def with_choice(config: Config, choice: MemoryChoice) -> Config:
    """The configuration with a choice written down, as a run's config.yaml keeps it."""
    memory = replace(
        config.memory, quantize=choice.quantize, keep=choice.keep.value, keep_everything=choice.keep_everything,
        stream_blocks=None if choice.slices > 1 else choice.stream_blocks, offload_inputs=choice.offload_inputs,
        graphs=choice.graphs,
    )  # fmt: skip
    return replace(config, memory=memory)


def without_graphs(config: Config) -> Config:
    return replace(config, memory=replace(config.memory, graphs=False))


def encoder_choice(config: Config) -> tuple[bool | None, bool | None]:
    """Whether the text encoder is streamed, and whether the video VAE works in tiles; None: the budget decides."""
    text, tiles = config.memory.text, config.memory.tiles
    return None if text == "auto" else text == "layers", None if tiles == "auto" else tiles == "on"


def budget_gib(config: Config) -> float | None:
    return config.memory.budget_gib


def compiles(config: Config, on_gpu: bool) -> bool:
    return config.memory.compile == "on" or (config.memory.compile == "auto" and on_gpu)


def fixed_memory_settings(config: Config) -> list[str]:
    """Names of the memory settings that are fixed and that the plan would choose."""
    planned = ("keep", "keep_everything", "stream_blocks", "offload_inputs", "graphs")
    return [f"memory.{name}" for name in planned if getattr(config.memory, name) is not None]


def precision(config: Config) -> tuple[str, str]:
    """(memory.quantize, memory.compute) as they are set."""
    return config.memory.quantize, config.memory.compute
