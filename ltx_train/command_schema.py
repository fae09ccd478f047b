"""The schema of what single commands read beside a run's own settings. Declarations only."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """space: lines of setting=log(a, b), uniform(a, b), int(a, b) or choice(a, b, ...). sampler: tpe proposes values
    from what was found so far, grid tries every combination of choices. parallel: so many trials at a time, each on
    strategy.devices of this machine, or, with place=slurm, as a job that `cluster` describes. prune: give up trials
    whose held-out loss is worse than the median of the others at the same step, from step `warmup` on."""

    name: str = "sweep"
    trials: int = 12
    sampler: str = "tpe"
    parallel: int = 1
    place: str = "local"
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
