"""Settings of the machine: memory, devices, clusters. Declarations only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ltx_train.config.schema.fields import setting
from ltx_train.distributed.strategies import ENGINES, STRATEGIES


@dataclass(kw_only=True)
class MemoryConfig:
    """What is traded for memory. The plan chooses what is null: the fastest that fits into the budget."""

    budget_gib: float | None = setting(None, "GiB that a process may reserve on the GPU; null: what is free", least=0.5)
    quantize: str = setting(
        "none", "dtype of frozen block weights; auto: none, or 8 bits where that is faster",
        choices=("none", "int8", "int4", "float8", "auto"),
    )  # fmt: skip
    compute: str = setting("bf16", "large products in float8 (fp8) or int8", choices=("bf16", "fp8", "int8"))
    keep: str | None = setting(
        None, "what a block keeps for backward; the rest is recomputed",
        choices=(None, "everything", "attention", "inputs"),
    )  # fmt: skip
    keep_everything: int | None = setting(None, "blocks that keep everything whatever memory.keep is", least=0)
    stream_blocks: int | None = setting(None, "blocks that are streamed from host memory", least=0)
    stream_slots: int = setting(3, "streamed blocks that are on the device at a time", least=2)
    offload_inputs: bool | None = setting(None, "block inputs wait in host memory for backward")
    graphs: bool | None = setting(None, "forward and backward as one CUDA graph per shape")
    text: str = setting(
        "auto", "the text encoder of `prepare` and `sample`; layers: from host memory, one after the other",
        choices=("auto", "whole", "layers"),
    )  # fmt: skip
    tiles: str = setting(
        "auto", "the video VAE works in tiles; auto: where the budget asks", choices=("auto", "on", "off")
    )
    compile: str = setting("auto", "compile blocks; auto: on a GPU", choices=("auto", "on", "off"))


@dataclass(kw_only=True)
class StrategyConfig:
    """How several devices share a run."""

    name: str = setting("single", "what the devices share", choices=STRATEGIES)
    offload: str | None = setting(
        None, "masters and moments of a full fine-tune: cpu, a folder on a fast disk, or null: the device"
    )
    engine: str = setting(
        "auto", "whose ZeRO slices; auto: this project's on one machine, DeepSpeed's on several", choices=ENGINES
    )
    hpz: int | None = setting(
        None, "DeepSpeed's ZeRO-3: devices that hold a second slice of all weights; 1: none, null: a machine's",
        least=1,
    )  # fmt: skip
    deepspeed: dict[str, Any] = setting(dict[str, Any](), "DeepSpeed's own settings, merged over this project's")
    sequence: int = setting(1, "devices that share each sample's video tokens, for long clips", least=1)
    device: str = setting("auto", "kind of device", choices=("auto", "cpu", "cuda"))
    devices: int = setting(1, "processes on this machine, one for each device", least=1)
    step_timeout_s: float = setting(900.0, "seconds without a step that end a process; 0: never", least=0)
    start_timeout_s: float = setting(3600.0, "the same while loading, measuring and saving; 0: never", least=0)


@dataclass(kw_only=True)
class ClusterConfig:
    """A SLURM job."""

    nodes: int = setting(1, "nodes of the job", least=1)
    devices: int = setting(1, "tasks per node, one for each device", least=1)
    cpus: int = setting(8, "processors per task", least=1)
    time: str = setting("24:00:00", "time limit")
    partition: str | None = setting(None, "partition")
    account: str | None = setting(None, "account")
    gres: str | None = setting(None, "generic resources; null: gpu:<devices>")
    directives: list[str] = setting(list[str](), "further #SBATCH directives")
    setup: list[str] = setting(list[str](), "shell lines before the run (module load, activating a venv)")
    container: str | None = setting(None, "image for srun --container-image")
    array: list[str] = setting(list[str](), "a job array: one line of overrides for each task")
    signal_s: int = setting(120, "seconds of notice before the time limit", least=1)
    hung_restarts: int = setting(3, "restarts of a hung run", least=0)
    device_restarts: int = setting(3, "restarts without the nodes whose GPUs failed", least=0)
    python: str | None = setting(None, "the interpreter on the nodes; null: this one")
    submit: bool = setting(True, "false: show the script and submit nothing")


@dataclass(kw_only=True)
class SuperviseConfig:
    """Keeping a run alive on a machine that may be taken away."""

    store: str | None = setting(None, "object store that mirrors the run (s3://, gs://, file://)")
    notice: str = setting("none", "the cloud that announces the end of the machine", choices=("none", "aws", "gcp"))
    notice_url: str | None = setting(None, "address of the notice service; null: the cloud's own")
    poll_s: float = setting(5.0, "seconds between two questions for a notice", least=0.1)
    restarts: int = setting(3, "starts in a row that may save nothing new", least=1)
    backoff_s: float = setting(5.0, "pause before a restart in seconds, doubled each time", least=0)
