"""The objects of a training run, put together from its configuration and its start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx_train import config as configuration
from ltx_train.commands import logging, measuring, optimizing, session, summary, transformers
from ltx_train.commands.previews import Previews
from ltx_train.config import Config
from ltx_train.contracts import DataError, Exit
from ltx_train.data.index import Index
from ltx_train.data.module import ShardData, training_order
from ltx_train.data.reader import Reader
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.memory import footprint
from ltx_train.memory.cards import GIB, card_of_device
from ltx_train.memory.plan import Planned
from ltx_train.model import adapter, export
from ltx_train.model.loaders import TRANSFORMER_PREFIX, build_transformer
from ltx_train.model.transformer import Transformer
from ltx_train.training import checkpointing
from ltx_train.training.average import Average
from ltx_train.training.balance import Balance
from ltx_train.training.clock import Clock
from ltx_train.training.fit import Outside, Plan, fit
from ltx_train.training.monitor import Monitor
from ltx_train.training.optim import Schedule
from ltx_train.training.ranks import Ranks
from ltx_train.training.selection import Selection
from ltx_train.training.spikes import Spikes
from ltx_train.training.task import Objective, Task
from ltx_train.training.tracking import Metrics
from ltx_train.training.updates import Updates
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


def train(config: Config, start: Start, planned: Planned | None, ranks: Ranks, watchdog: Watchdog) -> Exit:
    """Trains to the end, or to a signal. A tracker that refuses says so before anything is loaded."""
    opened: list[Metrics] = []
    ranks.lead(lambda: opened.append(_tracker(config, start)))
    transformer, updates = optimizing.opened(config, ranks, fresh=start.checkpoint is None)
    monitor = Monitor(config.loss.video_weight, config.loss.audio_weight, planned.footprint.gib if planned else None)
    selection, clock = Selection(config.eval.patience), Clock(_peak_flops(config, ranks))
    base = session.weights(config).fingerprint(TRANSFORMER_PREFIX)
    plan = _plan(config, start, base)
    task = _task(config, start, transformer, updates, plan, ranks)
    if start.checkpoint is not None:
        _verify(start.checkpoint, ranks)
        _restore(checkpointing.load(start.checkpoint, verified=True), task, monitor, selection, clock, ranks)
    if ranks.leads:
        summary.show(config, transformer, start.index, start.folder, start.step, planned)
    outside = _outside(config, start, task, base, ranks, watchdog, opened[0] if opened else None)
    device = session.device(config, ranks.local)
    return fit(plan, task, _data(config, start, ranks), monitor, device, outside, ranks, selection, clock)


def _tracker(config: Config, start: Start) -> Metrics:
    return Metrics(start.folder, start.step, logging.sinks(config, start.folder, start.step))


def _plan(config: Config, start: Start, base: str) -> Plan:
    return Plan(
        start.folder, config.optim.steps, config.logger.every, config.eval.interval, config.checkpoint.interval,
        config.checkpoint.keep, config.checkpoint.failures, int(os.environ.get("LTX_TRAIN_RESTARTS", "0")),
        {"base": base}, sharded=session.shares_updates(config) and config.adapter.kind == "full",
    )  # fmt: skip


def _task(
    config: Config, start: Start, transformer: Transformer, updates: Updates, plan: Plan, ranks: Ranks
) -> Task:  # fmt: skip
    optim, loss = config.optim, config.loss
    parameters = adapter.trainable_parameters(transformer)
    decay = loss.balance_decay if loss.balance == "auto" else None
    device = session.device(config, ranks.local)
    goal = Objective(
        configuration.training(config), session.sigma_distribution(config), dict(loss.token_weights), config.run.seed
    )
    return Task(
        transformer, goal, Schedule(optim.schedule, optim.lr, optim.final_lr, optim.warmup, optim.steps), updates,
        optim.clip, start.step, configuration.rounds(config, ranks.world), ranks,
        Balance(loss.video_weight, loss.audio_weight, loss.weighting, decay, device),
        Average(parameters, config.adapter.ema) if config.adapter.ema else None, plan.logs, _flops(config),
        transformers.recorded(config, transformer, updates.gathering, device),
        in_step=config.strategy.name in ("zero2", "zero3"),
        spikes=Spikes(optim.skip_spikes, device) if optim.skip_spikes else None,
    )  # fmt: skip


def _flops(config: Config) -> Callable[[ModelInputs], float]:
    """The model's arithmetic for a batch, from its numbers of tokens."""
    size = footprint.sizes(build_transformer(session.layout(config)))
    full = config.adapter.kind == "full"

    def count(inputs: ModelInputs) -> float:
        tokens = [0 if m is None else m.latent.shape[1] for m in (inputs.video, inputs.audio)]
        present = inputs.video or inputs.audio
        assert present is not None
        work = footprint.Work(present.latent.shape[0], tokens[0], tokens[1], present.context.shape[1])
        return footprint.model_flops(size, work, full=full) / config.strategy.sequence

    return count


def _peak_flops(config: Config, ranks: Ranks) -> float | None:
    """The device's dense bfloat16 rate by its datasheet; None on a CPU."""
    device = session.device(config, ranks.local)
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return card_of_device(properties.name, properties.total_memory / GIB).bf16_tflops * 1e12


def _verify(checkpoint: Path, ranks: Ranks) -> None:
    """The ranks read a part of the files each, and all of them say what one has found."""
    problem: str | None = None
    try:
        checkpointing.verify(checkpoint, ranks.rank, ranks.world)
    except DataError as error:
        problem = str(error)
    found = [said for said in ranks.gather(problem) if said]

    def refuse() -> None:
        if found:
            raise DataError(found[0])

    ranks.lead(refuse)


def _restore(
    checkpoint: checkpointing.Checkpoint,
    task: Task,
    monitor: Monitor,
    selection: Selection,
    clock: Clock,
    ranks: Ranks,
) -> None:
    task.updates.restore(checkpoint.weights, checkpoint.optimizer)
    notes = checkpoint.notes
    monitor.restore(notes["monitor"], ranks)
    # Checkpoints of releases before these existed have none of them.
    if "balance" in notes:
        task.balance.restore(notes["balance"])
    if task.spikes is not None and notes.get("spikes"):
        task.spikes.restore(notes["spikes"])
    if "selection" in notes:
        selection.restore(notes["selection"])
    if "clock" in notes:
        clock.restore(notes["clock"])
    if task.average is not None:
        task.average.restore(checkpoint.average or checkpoint.weights)


def _outside(
    config: Config, start: Start, task: Task, base: str, ranks: Ranks, watchdog: Watchdog, metrics: Metrics | None
) -> Outside:
    published = nullcontext if task.average is None else task.average.applied
    previews = Previews(config, start.root, start.index) if config.eval.samples and metrics is not None else None

    def show(step: int) -> None:
        if previews is not None and metrics is not None:
            for clip in previews.generate(task.transformer, start.folder / "samples" / f"step-{step:06d}"):
                metrics.media(step, clip.path, clip.path.stem)

    evaluate = measuring.evaluator(
        config, start.folder, start.root, start.index, task.transformer, ranks, published, show
    )

    def measured(step: int) -> Mapping[str, float]:
        assert evaluate is not None
        task.release()  # measuring needs memory that recorded passes hold
        return evaluate(step)

    return Outside(
        metrics, measured if evaluate is not None else None,
        lambda step, weights: publish(config, weights, start.folder, step, base), watchdog,
    )  # fmt: skip


def publish(config: Config, weights: Mapping[str, Tensor], folder: Path, step: int, base: str) -> None:
    """Every committed step of an adapter is at once a file other programs load."""
    if config.adapter.kind == "lora":
        lora = session.lora(config)
        tensors = export.lora_tensors(weights, lora, session.dtype(config))
        export.write(folder / "adapters" / f"step-{step:06d}.safetensors", tensors, lora_metadata(config, step, base))


def lora_metadata(config: Config, step: int, base: str) -> dict[str, str]:
    """What a LoRA file says of itself; values are strings, as safetensors wants them."""
    facts = session.mode_facts(config)
    # How much smaller its control videos are is something an in-context LoRA's user has to know.
    scales = [c.spatial_scale or config.data.reference_scale for c in config.mode.references if c.stream == "video"]
    return {
        "rank": str(config.adapter.rank), "alpha": f"{config.adapter.alpha:g}",
        "alpha_folded": "true", "targets": ",".join(config.adapter.targets), "base_fingerprint": base,
        "step": str(step), "mode": ";".join(f"{k}={v}" for k, v in facts.items()),
        "trigger": config.data.trigger or "", "merged_before": Path(config.model.merge or "").name,
        "trainer": "ltx-train", **({"reference_downscale_factor": str(max(scales))} if scales else {}),
    }  # fmt: skip


def _data(config: Config, start: Start, ranks: Ranks) -> ShardData:
    optim = config.optim
    assert optim.global_batch is not None
    order = training_order(start.index, optim.global_batch, config.run.seed)
    modes = [mode for _, mode in configuration.training(config)]
    wants = session.wants(config, modes, training=True)
    reader = Reader(start.root, start.index, seed=config.run.seed, wants=wants)
    return ShardData(
        reader, order, micro_batch=optim.batch_size, first_step=start.step, last_step=optim.steps,
        workers=config.data.workers, rank=ranks.rank // config.strategy.sequence,
        world=configuration.readers(config, ranks.world),
    )  # fmt: skip
