"""`ltx-train fit`: train; the same command continues an interrupted run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train.commands import planning, session, summary, transformers
from ltx_train.commands.check import refuse_bad
from ltx_train.config import Config
from ltx_train.contracts import Exit, UserError
from ltx_train.data.audit import audit
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.module import ShardData, training_order
from ltx_train.data.reader import Reader
from ltx_train.evaluation import heldout
from ltx_train.memory.plan import Planned
from ltx_train.model import adapter, export
from ltx_train.model.loaders import TRANSFORMER_PREFIX
from ltx_train.model.transformer import Transformer
from ltx_train.training import checkpointing
from ltx_train.training.checkpointing import Checkpoint
from ltx_train.training.fit import Plan, fit
from ltx_train.training.lock import FolderLock
from ltx_train.training.monitor import Monitor
from ltx_train.training.optim import Schedule, build_optimizer
from ltx_train.training.task import Objective, Task
from ltx_train.training.tracking import Metrics


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, its data, and the checkpoint it continues from."""

    folder: Path
    root: Path
    index: Index
    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def run(config: Config) -> int:
    """DONE, or PREEMPTED after a signal and a save."""
    folder = session.run_dir(config)
    config, planned = planning.settle(_with_saved_precision(config, folder))
    with FolderLock(folder):
        start = _start(config, folder)
        if start.step >= config.optim.steps:
            print(f"{folder} is complete: {start.step} of {config.optim.steps} steps are done")
            return Exit.DONE
        try:
            code = _train(config, start, planned)
        except torch.OutOfMemoryError as error:
            raise UserError(planning.out_of_memory(config, planned)) from error
    if code is Exit.PREEMPTED:
        print("stopped after a save; the same command continues", file=sys.stderr)
    return code


def _with_saved_precision(config: Config, folder: Path) -> Config:
    """A run that was started with `quantize: auto` goes on with the precision that was chosen then."""
    saved = folder / "config.yaml"
    if config.memory.quantize != "auto" or not saved.is_file():
        return config
    return replace(config, memory=replace(config.memory, quantize=configuration.load(saved).memory.quantize))


def _start(config: Config, folder: Path) -> Start:
    """Everything that can be refused is refused here, before weights are loaded."""
    root, index, stale = session.prepared(config)
    refuse_bad(audit(root, index, config.mode, stale, config.data.silence_db), root)
    saved = folder / "config.yaml"
    found = checkpointing.committed(folder / "checkpoints") if config.run.resume == "auto" else []
    if saved.is_file() and found:
        for line in configuration.refuse_drift(configuration.load(saved), config, folder):
            print(f"changed since the run was started: {line}")
    folder.mkdir(parents=True, exist_ok=True)
    saved.write_text(configuration.dump(config))
    return Start(folder, root, index, checkpointing.load(found[-1]) if found else None)


def _train(config: Config, start: Start, planned: Planned | None) -> Exit:
    device = session.device(config)
    transformer = transformers.trainable(config)
    parameters = adapter.trainable_parameters(transformer)
    optim = config.optim
    optimizer = build_optimizer(
        optim.name, parameters.values(), optim.lr, (optim.betas[0], optim.betas[1]), optim.weight_decay
    )
    predicted = planned.footprint.gib if planned else None
    monitor = Monitor(config.loss.video_weight, config.loss.audio_weight, predicted)
    if start.checkpoint is not None:
        adapter.load_state(transformer, start.checkpoint.weights)
        optimizer.load_state_dict(dict(start.checkpoint.optimizer))
        monitor.restore(start.checkpoint.notes["monitor"])
    goal = Objective(
        config.mode, session.sigma_distribution(config), config.loss.video_weight, config.loss.audio_weight,
        config.run.seed,
    )  # fmt: skip
    schedule = Schedule(optim.schedule, optim.lr, optim.final_lr, optim.warmup, optim.steps)
    task = Task(transformer, goal, schedule, optimizer, optim.clip, start.step)
    summary.show(config, transformer, start.index, start.folder, start.step, planned)
    metrics = Metrics(start.folder, start.step, config.logger.wandb, config.logger.project, _plain(config))
    base = session.weights(config).fingerprint(TRANSFORMER_PREFIX)
    plan = Plan(
        start.folder, optim.steps, optim.accumulate, config.logger.every, config.eval.interval,
        config.checkpoint.interval, config.checkpoint.keep, {"base": base},
    )  # fmt: skip
    return fit(
        plan, task, _data(config, start), monitor, metrics, device,
        _evaluator(config, start, transformer), lambda step: publish(config, transformer, start.folder, step, base),
    )  # fmt: skip


def publish(config: Config, transformer: Transformer, folder: Path, step: int, base: str) -> None:
    """Every committed step of an adapter is at once a file other programs load."""
    if config.adapter.kind == "lora":
        lora = session.lora(config)
        tensors = export.lora_tensors(
            adapter.lora_parameters(transformer), lora.rank, lora.alpha, session.dtype(config)
        )
        export.write(folder / "adapters" / f"step-{step:06d}.safetensors", tensors, lora_metadata(config, step, base))


def lora_metadata(config: Config, step: int, base: str) -> dict[str, str]:
    """What a LoRA file says of itself; values are strings, as safetensors wants them."""
    facts = session.mode_facts(config)
    return {
        "rank": str(config.adapter.rank), "alpha": f"{config.adapter.alpha:g}",
        "alpha_folded": "true", "targets": ",".join(config.adapter.targets), "base_fingerprint": base,
        "step": str(step), "mode": ";".join(f"{k}={v}" for k, v in facts.items()),
        "trigger": config.data.trigger or "", "trainer": "ltx-train",
    }  # fmt: skip


def _data(config: Config, start: Start) -> ShardData:
    optim = config.optim
    order = training_order(start.index, optim.batch_size * optim.accumulate, config.run.seed)
    reader = Reader(start.root, start.index, seed=config.run.seed, references=config.mode.uses_reference)
    return ShardData(
        reader, order, micro_batch=optim.batch_size, first_step=start.step, last_step=optim.steps,
        workers=config.data.workers,
    )  # fmt: skip


def _evaluator(config: Config, start: Start, transformer: Transformer) -> Any:
    if config.eval.interval == 0 or not start.index.split(HELDOUT):
        return None

    def evaluate(_step: int) -> Mapping[str, float]:
        rows = heldout.measure(
            transformer, str(start.root), start.index, session.evaluation(config), session.device(config),
            with_base=config.adapter.kind == "lora",
        )  # fmt: skip
        return heldout.summary(rows)

    return evaluate


def _plain(config: Config) -> dict[str, Any]:
    return asdict(config)
