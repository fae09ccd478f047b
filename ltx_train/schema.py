"""The schema of the configuration: every setting, its type and its default.

Declarations only; the rules between fields are in `config`. No heavy imports.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ltx_train.contracts import Mode


@dataclass
class ModelConfig:
    """preset names the sizes when weights are random; path is the single-file checkpoint otherwise."""

    preset: str = "tiny"
    path: str | None = None
    weights: str = "file"
    seed: int = 0
    dtype: str = "bfloat16"
    text_encoder: str | None = None
    text_tokens: int = 1024


@dataclass
class AdapterConfig:
    """kind: lora trains an adapter on the frozen base, full trains every weight."""

    kind: str = "lora"
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list[str])


@dataclass
class DataConfig:
    """source: what `prepare` reads; root: the prepared folder it writes and `fit` reads."""

    root: str = MISSING
    source: str | None = None
    buckets: list[str] = field(default_factory=list[str])
    fps: float = 25.0
    caption: str | None = None
    trigger: str | None = None
    reference_s: float = 3.5
    heldout_speakers: float = 0.1
    latent_dtype: str = "bfloat16"
    samples_per_shard: int = 256
    silence_db: float = -60.0
    on_bad_clip: str = "error"
    workers: int = 2


@dataclass
class SigmaConfig:
    """The shifted logit-normal distribution of noise levels."""

    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1


@dataclass
class LossConfig:
    video_weight: float = 1.0
    audio_weight: float = 1.0


@dataclass
class OptimConfig:
    """steps are optimizer steps; the learning rate is a function of the step alone.

    batch_size: samples that one device takes at once. global_batch: samples of an optimizer step over all
    devices, in as many rounds as that takes; null: one round. A run keeps its global batch on any number of devices.

    schedule: constant, linear or cosine from lr down to final_lr, after `warmup` linear steps.
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


@dataclass
class MemoryConfig:
    """What is traded for memory; null is left to the plan, which takes the fastest that fits into the budget.

    budget_gib: what the process may reserve on the GPU (null: what is free there).
    quantize: frozen block weights as none, int8, int4 or float8; auto: none, or int8 where that is faster.
    compute: bf16, or fp8 for the large products. keep: what a block keeps for backward: everything,
    attention or inputs. keep_everything: so many blocks keep everything nevertheless. stream_blocks: so many
    blocks live in host memory and pass through stream_slots slots on the device. offload_inputs: what blocks
    keep of their inputs waits in host memory. compile: auto (on a GPU), on or off.
    """

    budget_gib: float | None = None
    quantize: str = "none"
    compute: str = "bf16"
    keep: str | None = None
    keep_everything: int | None = None
    stream_blocks: int | None = None
    stream_slots: int = 3
    offload_inputs: bool | None = None
    compile: str = "auto"


@dataclass
class StrategyConfig:
    """name: single, or ddp for several devices. device: auto, cpu or cuda. devices: processes on this machine; on
    several machines srun or torchrun starts them. A process without progress for step_timeout_s (start_timeout_s
    while it loads, validates or saves) ends with its stacks written down; 0 switches that off."""

    name: str = "single"
    device: str = "auto"
    devices: int = 1
    step_timeout_s: float = 900.0
    start_timeout_s: float = 3600.0


@dataclass
class EvalConfig:
    """Held-out loss on a fixed sigma grid with fixed noise; `wrong_references` draws per sample for the gap."""

    interval: int = 250
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    seed: int = 1234
    batch_size: int = 1
    max_samples: int = 0
    wrong_references: int = 1


@dataclass
class LoggerConfig:
    """wandb: offline, online or disabled; every: steps between two logged lines."""

    wandb: str = "offline"
    project: str = "ltx-train"
    every: int = 10


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
class CheckConfig:
    previews: int = 4


@dataclass
class SampleConfig:
    """Sampling settings; adapter is a LoRA file, run a trained run folder whose newest adapter is used."""

    prompt: str = ""
    negative_prompt: str = ""
    bucket: str | None = None
    fps: float | None = None
    steps: int = 30
    seed: int = 42
    adapter: str | None = None
    strength: float = 1.0
    image: str | None = None
    audio: str | None = None
    reference_audio: str | None = None
    video_cfg: float = 1.0
    audio_cfg: float = 1.0
    modality_scale: float = 1.0
    stg_scale: float = 0.0
    stg_blocks: list[int] = field(default_factory=list[int])
    rescale: float = 0.0
    out: str = "sample.mp4"


@dataclass
class ExportConfig:
    """run: the run folder (default: the one this configuration names); step: a checkpoint's step, newest by default."""

    run: str | None = None
    step: int | None = None
    out: str | None = None


@dataclass
class InspectConfig:
    """file: the LoRA to prove against model.path; strict numerics compare against the run's own output."""

    file: str | None = None
    run: str | None = None


@dataclass
class BenchConfig:
    """out: a JSON file that the record is added to; case names the record. baseline: time the plain path instead."""

    steps: int = 5
    warmup: int = 3
    case: str = ""
    out: str | None = None
    baseline: bool = False


@dataclass
class SuperviseConfig:
    """store: an object store that the run's folder is mirrored to (s3://, gs://, file://; needs its fsspec package).
    notice: none, aws or gcp; asked every poll_s seconds at notice_url instead of the cloud's own address.
    restarts: so many starts in a row may save nothing new; backoff_s: pause before a restart, doubled each time."""

    store: str | None = None
    notice: str = "none"
    notice_url: str | None = None
    poll_s: float = 5.0
    restarts: int = 3
    backoff_s: float = 5.0


@dataclass
class ClusterConfig:
    """A SLURM job: devices are tasks per node. setup: shell lines before the run (module load, activating a venv);
    container: an image for srun --container-image; directives: further #SBATCH words; array: one run per line of
    overrides; signal_s: notice before the time limit; hung_restarts: so often a hung run is started again;
    python: the interpreter on the nodes; submit: false shows the script and submits nothing."""

    nodes: int = 1
    devices: int = 1
    cpus: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    gres: str | None = None
    directives: list[str] = field(default_factory=list[str])
    setup: list[str] = field(default_factory=list[str])
    container: str | None = None
    array: list[str] = field(default_factory=list[str])
    signal_s: int = 120
    hung_restarts: int = 3
    python: str | None = None
    submit: bool = True


@dataclass
class SweepConfig:
    """space: lines of setting=log(a, b), uniform(a, b), int(a, b) or choice(a, b, ...). prune: give up trials whose
    held-out loss is worse than the median of the others at the same step, from step `warmup` on."""

    name: str = "sweep"
    trials: int = 12
    space: list[str] = field(default_factory=list[str])
    prune: bool = True
    warmup: int = 0


@dataclass
class DoctorConfig:
    """json: findings for a program instead of a person."""

    json: bool = False


@dataclass
class PlanConfig:
    """card: a GPU by name, for planning on a machine without it."""

    card: str | None = None


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    mode: Mode = field(default_factory=Mode)
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
