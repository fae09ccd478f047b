"""`ltx-train fit`: train; the same command continues an interrupted run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx_train import config as configuration
from ltx_train.commands import launch, planning, session, summary, transformers
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
from ltx_train.training.fit import Outside, Plan, fit
from ltx_train.training.lock import FolderLock
from ltx_train.training.monitor import Monitor
from ltx_train.training.optim import Schedule, build_optimizer
from ltx_train.training.preemption import stop_before_training
from ltx_train.training.ranks import Ranks, found, joined
from ltx_train.training.task import Objective, Task
from ltx_train.training.tracking import Metrics, read_rows
from ltx_train.training.watchdog import Watchdog


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, its data, and the checkpoint it continues from."""

    folder: Path
    root: Path
    index: Index
    checkpoint: Path | None

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-")) if self.checkpoint else 0


def run(config: Config) -> int:
    """DONE, or PREEMPTED after a signal and a save; starts the other processes of this machine if there are any."""
    ranks = found(os.environ)
    if ranks.world == 1 and config.strategy.devices > 1:
        return launch.run(run, config, config.strategy.devices)
    if ranks.world > 1 and config.strategy.name == "single":
        raise UserError(f"{ranks.world} processes were started, but strategy=single: set strategy=ddp")
    stop_before_training()
    device = session.device(config, ranks.local)
    with joined(ranks, device, config.strategy.start_timeout_s or 86400):
        return _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> int:
    folder = session.run_dir(config)
    with ExitStack() as stack:
        ranks.lead(lambda: _entered(stack, FolderLock(folder)))
        config, planned, start = ranks.lead(lambda: _start(config, folder, ranks.world))
        if start.step >= config.optim.steps:
            if ranks.leads:
                print(f"{folder} is complete: {start.step} of {config.optim.steps} steps are done")
            return Exit.DONE
        limits = (config.strategy.start_timeout_s, config.strategy.step_timeout_s)
        watchdog = stack.enter_context(Watchdog(folder, ranks.rank, *limits))
        try:
            code = _train(config, start, planned, ranks, watchdog)
        except torch.OutOfMemoryError as error:
            raise UserError(planning.out_of_memory(config, planned)) from error
    if code is Exit.PREEMPTED and ranks.leads:
        print("stopped after a save; the same command continues", file=sys.stderr)
    return code


def _entered(stack: ExitStack, lock: FolderLock) -> None:
    stack.enter_context(lock)


def _start(config: Config, folder: Path, world: int) -> tuple[Config, Planned | None, Start]:
    """Settles what the configuration leaves open; everything that can be refused is refused here, before
    weights are loaded."""
    root, index, stale = session.prepared(config)
    refuse_bad(audit(root, index, config.mode, stale, config.data.silence_db), root)
    saved = folder / "config.yaml"
    found = checkpointing.committed(folder / "checkpoints") if config.run.resume == "auto" else []
    before = configuration.load(saved) if saved.is_file() and found else None
    config, planned = planning.settle(configuration.continued(config, before, world))
    configuration.rounds(config, world)
    if before is not None:
        for line in configuration.refuse_drift(before, config, folder):
            print(f"changed since the run was started: {line}")
        print(_resuming(folder, found[-1]))
    folder.mkdir(parents=True, exist_ok=True)
    saved.write_text(configuration.dump(config))
    return config, planned, Start(folder, root, index, found[-1] if found else None)


def _resuming(folder: Path, checkpoint: Path) -> str:
    """What is continued, and how many steps that had been logged are to be done again."""
    step = int(checkpoint.name.removeprefix("step-"))
    rows = read_rows(folder / "metrics.jsonl")
    lost = max(0, int(rows[-1]["step"]) - step) if rows else 0
    return f"resuming {folder} at step {step} from {checkpoint}, {lost} steps lost"


def _train(config: Config, start: Start, planned: Planned | None, ranks: Ranks, watchdog: Watchdog) -> Exit:
    device = session.device(config, ranks.local)
    transformer = transformers.trainable(config)
    parameters = adapter.trainable_parameters(transformer)
    optim = config.optim
    optimizer = build_optimizer(
        optim.name, parameters.values(), optim.lr, (optim.betas[0], optim.betas[1]), optim.weight_decay
    )
    monitor = Monitor(config.loss.video_weight, config.loss.audio_weight, planned.footprint.gib if planned else None)
    if start.checkpoint is not None:
        checkpoint = checkpointing.load(start.checkpoint)
        adapter.load_state(transformer, checkpoint.weights)
        optimizer.load_state_dict(dict(checkpoint.optimizer))
        monitor.restore(checkpoint.notes["monitor"], ranks)
    goal = Objective(
        config.mode, session.sigma_distribution(config), config.loss.video_weight, config.loss.audio_weight,
        config.run.seed,
    )  # fmt: skip
    schedule = Schedule(optim.schedule, optim.lr, optim.final_lr, optim.warmup, optim.steps)
    rounds = configuration.rounds(config, ranks.world)
    task = Task(transformer, goal, schedule, optimizer, optim.clip, start.step, rounds, ranks)
    if ranks.leads:
        summary.show(config, transformer, start.index, start.folder, start.step, planned)
    base = session.weights(config).fingerprint(TRANSFORMER_PREFIX)
    plan = Plan(
        start.folder, optim.steps, config.logger.every, config.eval.interval, config.checkpoint.interval,
        config.checkpoint.keep, config.checkpoint.failures, int(os.environ.get("LTX_TRAIN_RESTARTS", "0")),
        {"base": base},
    )  # fmt: skip
    return fit(
        plan, task, _data(config, start, ranks), monitor, device,
        _outside(config, start, transformer, base, ranks, watchdog), ranks,
    )  # fmt: skip


def _outside(
    config: Config, start: Start, transformer: Transformer, base: str, ranks: Ranks, watchdog: Watchdog
) -> Outside:
    metrics = None
    if ranks.leads:
        metrics = Metrics(start.folder, start.step, config.logger.wandb, config.logger.project, _plain(config))
    return Outside(
        metrics, _evaluator(config, start, transformer, ranks),
        lambda step, weights: publish(config, weights, start.folder, step, base), watchdog,
    )  # fmt: skip


def publish(config: Config, weights: Mapping[str, Tensor], folder: Path, step: int, base: str) -> None:
    """Every committed step of an adapter is at once a file other programs load."""
    if config.adapter.kind == "lora":
        lora = session.lora(config)
        tensors = export.lora_tensors(weights, lora.rank, lora.alpha, session.dtype(config))
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


def _data(config: Config, start: Start, ranks: Ranks) -> ShardData:
    optim = config.optim
    assert optim.global_batch is not None
    order = training_order(start.index, optim.global_batch, config.run.seed)
    reader = Reader(start.root, start.index, seed=config.run.seed, references=config.mode.uses_reference)
    return ShardData(
        reader, order, micro_batch=optim.batch_size, first_step=start.step, last_step=optim.steps,
        workers=config.data.workers, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip


def _evaluator(config: Config, start: Start, transformer: Transformer, ranks: Ranks) -> Any:
    if config.eval.interval == 0 or not start.index.split(HELDOUT):
        return None

    def evaluate(_step: int) -> Mapping[str, float]:
        own = heldout.measure(
            transformer, str(start.root), start.index, session.evaluation(config), session.device(config, ranks.local),
            with_base=config.adapter.kind == "lora", share=(ranks.rank, ranks.world),
        )  # fmt: skip
        return heldout.summary([row for rows in ranks.gather(own) for row in rows])

    return evaluate


def _plain(config: Config) -> dict[str, Any]:
    return asdict(config)
