"""The schema of the configuration: every setting, its type and its default.

Declarations only; the rules between fields are in `config`. No heavy imports.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ltx_train.command_schema import (
    BenchConfig,
    CheckConfig,
    ClusterConfig,
    DoctorConfig,
    ExportConfig,
    InspectConfig,
    PlanConfig,
    SampleConfig,
    SuperviseConfig,
    SweepConfig,
)
from ltx_train.contracts import Mode


@dataclass
class ModelConfig:
    """preset names the sizes when weights are random; path is the single-file checkpoint otherwise.

    merge: a LoRA file added to the base's weights at merge_strength before anything else (a distilled LoRA, say).
    """

    preset: str = "tiny"
    path: str | None = None
    weights: str = "file"
    seed: int = 0
    dtype: str = "bfloat16"
    text_encoder: str | None = None
    text_tokens: int = 1024
    merge: str | None = None
    merge_strength: float = 1.0


@dataclass
class AdapterConfig:
    """kind: lora trains an adapter on the frozen base, full trains every weight.

    targets: named sets and name endings of linear layers; empty: the set that fits the mode. rank_pattern,
    alpha_pattern: other values for layers whose name ends so. rslora: scale alpha / sqrt(rank). dora: a trained
    magnitude per output. init: how A begins. start_from: a LoRA file whose weights the training begins with.
    ema: decay of the average of the weights that is measured and published, 0 for none.
    """

    kind: str = "lora"
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list[str])
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    start_from: str | None = None
    ema: float = 0.0


@dataclass
class DataConfig:
    """source: what `prepare` reads; root: the prepared folder it writes and `fit` reads.

    caption_dropout: share of draws without their caption; keep_trigger: the trigger word alone stays then.
    reference_scale: how many times smaller control videos (column reference_video) are prepared.
    """

    root: str = MISSING
    source: str | None = None
    buckets: list[str] = field(default_factory=list[str])
    fps: float = 25.0
    caption: str | None = None
    trigger: str | None = None
    caption_dropout: float = 0.0
    keep_trigger: bool = True
    reference_scale: int = 1
    reference_s: float = 3.5
    heldout_speakers: float = 0.1
    latent_dtype: str = "bfloat16"
    samples_per_shard: int = 256
    silence_db: float = -60.0
    on_bad_clip: str = "error"
    workers: int = 2


@dataclass
class SigmaConfig:
    """The distribution of noise levels (diffusion/sigma.py says what each number is)."""

    kind: str = "shifted_logit_normal"
    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    tokens: int | None = None
    shift_limits: list[float] = field(default_factory=list[float])
    mean: float = 0.0
    low: float = 0.0
    high: float = 1.0
    high_from: float = 0.7
    high_prob: float = 0.6


@dataclass
class LossConfig:
    """balance: auto divides each modality's loss by its moving average (decay balance_decay), so that both weigh
    alike times their weight. weighting: of noise levels, none or cosmap. token_weights: weight of the places of a
    mask in the shards, by its name (2 doubles them, 0 leaves them out)."""

    video_weight: float = 1.0
    audio_weight: float = 1.0
    balance: str = "none"
    balance_decay: float = 0.99
    weighting: str = "none"
    token_weights: dict[str, float] = field(default_factory=dict[str, float])


@dataclass
class OptimConfig:
    """steps are optimizer steps; the learning rate is a function of the step alone.

    batch_size: samples that one device takes at once. global_batch: samples of an optimizer step over all
    devices, in as many rounds as that takes; null: one round. A run keeps its global batch on any number of devices.

    schedule: constant, linear or cosine from lr down to final_lr, after `warmup` linear steps. clip: the gradient's
    norm is brought down to this, 0: never. skip_spikes: a step whose norm is more than so many times the mean of the
    last hundred changes nothing; null: all are taken.
    """

    name: str = "adamw"
    lr: float = 1e-4
    final_lr: float = 0.0
    schedule: str = "linear"
    warmup: int = 0
    steps: int = 1000
    batch_size: int = 1
    global_batch: int | None = None
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip: float = 1.0
    skip_spikes: float | None = None


@dataclass
class MemoryConfig:
    """What is traded for memory; null is left to the plan, which takes the fastest that fits into the budget.

    budget_gib: what the process may reserve on the GPU (null: what is free there).
    quantize: frozen block weights as none, int8, int4 or float8; auto: none, or int8 where that is faster.
    compute: bf16, or fp8 for the large products, whose outputs are then kept. keep: what a block keeps for
    backward: everything, attention or inputs. keep_everything: so many blocks keep everything nevertheless.
    stream_blocks: so many blocks live in host memory and pass through stream_slots slots on the device.
    offload_inputs: what blocks keep of their inputs waits in host memory. compile: auto (on a GPU), on or off.
    graphs: forward and backward as one CUDA graph per shape, which keeps the gradients' memory between steps.
    """

    budget_gib: float | None = None
    quantize: str = "none"
    compute: str = "bf16"
    keep: str | None = None
    keep_everything: int | None = None
    stream_blocks: int | None = None
    stream_slots: int = 3
    offload_inputs: bool | None = None
    graphs: bool | None = None
    compile: str = "auto"


@dataclass
class StrategyConfig:
    """name: single; for several devices ddp, or what they share out: zero1 masters and moments, zero2 gradients too,
    zero3 the blocks (of a frozen base these alone). offload: masters, moments and summed gradients of a full fine-tune
    in host memory (cpu), or in files in a folder on a fast disk. sequence: so many devices take each sample together, a
    part of its video tokens each, for clips that are too long for one. device: auto, cpu or cuda. devices: processes
    on this machine; on several machines srun or torchrun starts them. A process without progress for step_timeout_s
    (start_timeout_s while it loads, validates or saves) ends with its stacks written down; 0 switches that off."""

    name: str = "single"
    offload: str | None = None
    sequence: int = 1
    device: str = "auto"
    devices: int = 1
    step_timeout_s: float = 900.0
    start_timeout_s: float = 3600.0


@dataclass
class EvalConfig:
    """Held-out loss on fixed noise levels with fixed noise: at the middles of `quantiles` equally likely slices of
    what training draws, and at `sigmas`. wrong_references: other identities' per sample for the gap; dropped: the
    reference left out as well; wrong_caption: another clip's caption; attention: how much attention references get.
    samples: so many held-out clips are generated and shown. patience: so many measurements in a row without a
    better held-out loss end the run early, 0 never does."""

    interval: int = 250
    quantiles: int = 9
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    seed: int = 1234
    batch_size: int = 1
    max_samples: int = 0
    wrong_references: int = 2
    dropped: bool = True
    wrong_caption: bool = True
    attention: bool = True
    samples: int = 0
    patience: int = 0


@dataclass
class LoggerConfig:
    """wandb: offline, online or disabled; every: steps between two logged lines; also: csv, tensorboard."""

    wandb: str = "offline"
    project: str = "ltx-train"
    every: int = 10
    also: list[str] = field(default_factory=list[str])


@dataclass
class CheckpointConfig:
    """failures: so many saves in a row may fail before the run ends."""

    interval: int = 250
    keep: int = 3
    failures: int = 3


@dataclass
class RunConfig:
    """A run lives in <root>/<experiment>/<id>; the same three names continue it.

    allow: settings that may differ from the run's own although they change its course, as [optim.lr].
    """

    root: str = "runs"
    experiment: str = "default"
    id: str = "main"
    seed: int = 42
    resume: str = "auto"
    allow: list[str] = field(default_factory=list[str])


@dataclass
class Config:
    """mixture: weights of modes that training draws from, by the name of a preset or of an entry of `modes`; `mode`
    is then what is measured and sampled. checkpoints: what `evaluate` compares: run folders, LoRA files, patterns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mode: Mode = field(default_factory=Mode)
    mixture: dict[str, float] = field(default_factory=dict[str, float])
    modes: dict[str, Mode] = field(default_factory=dict[str, Mode])
    checkpoints: Any = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sigma: SigmaConfig = field(default_factory=SigmaConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
