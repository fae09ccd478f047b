"""The schema of the configuration: every setting with its type, default, help, limits and choices.

Declarations only. Rules between settings are in `config.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ltx_train.config.schema.commands import (
    BenchConfig,
    CaptionConfig,
    CheckConfig,
    CutConfig,
    DoctorConfig,
    ExportConfig,
    InspectConfig,
    LoraConfig,
    PlanConfig,
    SampleConfig,
    SwapConfig,
    SweepConfig,
    WatchConfig,
)
from ltx_train.config.schema.fields import setting
from ltx_train.config.schema.machine import ClusterConfig, MemoryConfig, StrategyConfig, SuperviseConfig
from ltx_train.config.schema.training import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoggerConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SigmaConfig,
)
from ltx_train.contracts import Mode

__all__ = ["Config", "DataConfig", "MemoryConfig"]


@dataclass(kw_only=True)
class Config:
    """All settings, by group."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mode: Mode = field(default_factory=Mode)
    mixture: dict[str, float] = setting(
        dict[str, float](), "weights of the modes that training draws from, by preset or by entry of `modes`"
    )
    modes: dict[str, Mode] = setting(dict[str, Mode](), "further modes by name, for `mixture`")
    checkpoints: Any = setting(None, "what `evaluate` compares: run folders, LoRA files, patterns")
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
    cut: CutConfig = field(default_factory=CutConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
