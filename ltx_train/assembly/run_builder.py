"""Builds the objects of a training run from its setup and its start, and runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train.assembly import (
    from_config,
    heldout_measurement,
    model_builder,
    model_source,
    neutral_references,
    planned_clips,
    publishing,
    run_facts,
    run_page,
    summary,
    trackers,
    update_builder,
)
from ltx_train.assembly.run_clips import TrainingClips
from ltx_train.assembly.setup import Setup
from ltx_train.contracts import DataError, Exit, StepResult, UserError
from ltx_train.data.index import Index
from ltx_train.data.module import ShardData, training_order
from ltx_train.data.reader import Reader
from ltx_train.diffusion import objective
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.objective import MicroBatch
from ltx_train.distributed.ranks import Ranks
from ltx_train.evaluation.heldout import Neutral
from ltx_train.memory.planning import duration, sizes
from ltx_train.memory.planning.cards import GIB, card_of_device
from ltx_train.model import adapter
from ltx_train.model.loaders import TRANSFORMER_PREFIX
from ltx_train.model.transformer import Transformer
from ltx_train.training.cadence import Cadence
from ltx_train.training.checkpoints import commit, manifest
from ltx_train.training.debugging import profiled, use_deterministic_kernels
from ltx_train.training.loop import Outside, run_to_end
from ltx_train.training.saving import CheckpointWriter
from ltx_train.training.stability.average import Average
from ltx_train.training.stability.balance import Balance
from ltx_train.training.stability.coded_products import ProductChoice
from ltx_train.training.stability.early_stop import EarlyStop
from ltx_train.training.stability.spikes import Spikes
from ltx_train.training.state import RunState
from ltx_train.training.step import Objective, OptimizerStep, StepRecipe, Task
from ltx_train.training.tracking.clock import Clock
from ltx_train.training.tracking.metrics import Metrics
from ltx_train.training.tracking.monitor import Monitor
from ltx_train.training.watchdog import Watchdog
from ltx_train.updates.deepspeed_updates import EngineUpdates
from ltx_train.updates.protocol import Updates


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """Where a run begins: its folder, its data, and the checkpoint it continues from (None: from nothing)."""

    folder: Path
    root: Path
    index: Index
    checkpoint: Path | None

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-")) if self.checkpoint else 0


def train(setup: Setup, start: RunStart, watchdog: Watchdog) -> Exit:
    """Trains to the end, or to a signal. A tracker that refuses ends the run before anything is loaded."""
    config, ranks = setup.config, setup.ranks
    if config.run.deterministic:
        use_deterministic_kernels()
    metrics = _open_metrics(setup, start)
    # Before the model is loaded: the text encoder has the device for itself.
    clips, neutral = _planned_clips(setup, start), neutral_references.of_heldout(setup, start.root, start.index)
    transformer, updates = update_builder.open_for_training(setup, fresh=start.checkpoint is None)
    watchdog.explain_with(updates.awaited)
    cadence = _cadence(setup)
    recipe, products = step_recipe(setup, transformer, updates, detailed=cadence.logs), _products(setup, transformer)
    if products is not None:
        recipe = replace(recipe, backward=products.before(recipe.backward))
    state = RunState(
        step=OptimizerStep(recipe, start.step),
        monitor=Monitor(config.loss.video_weight, config.loss.audio_weight, setup.planned_gib),
        early_stop=EarlyStop(config.eval.patience), clock=Clock(_peak_flops(setup.device)),
        base=model_source.weights(config).fingerprint(TRANSFORMER_PREFIX), products=products,
    )  # fmt: skip
    if start.checkpoint is not None:
        _verify(start.checkpoint, ranks)
        state.restore(commit.load(start.checkpoint, verified=True), ranks)
    if ranks.leads:
        run_facts.record(setup, start.folder, start.index)
        summary.show(setup, transformer, updates.sizes(), start.index, folder=start.folder, step=start.step)
    outside = _outside(setup, start, state, transformer, metrics=metrics, neutral=neutral, watchdog=watchdog)
    if clips is not None:
        outside = replace(outside, generate=_generate(clips, state, transformer, metrics))
    task = Task(transformer, state.step)
    with profiled(start.folder, ranks.rank, config.run.profile) as profiler:
        return run_to_end(
            task, _data(setup, start), state, cadence, replace(outside, profiler=profiler), folder=start.folder,
            ranks=ranks, engine=updates.engine if isinstance(updates, EngineUpdates) else None,
        )  # fmt: skip


def _products(setup: Setup, transformer: Transformer) -> ProductChoice | None:
    if setup.memory.compute == "bf16":
        return None
    return ProductChoice(transformer, setup.ranks, lambda line: print(f"ltx-train: {line}", file=sys.stderr))


def _planned_clips(setup: Setup, start: RunStart) -> TrainingClips | None:
    """None without clips, with a line where the encoders fail: a run does without clips rather than not at all."""
    try:
        planned = [*planned_clips.prompted(setup), *planned_clips.of_heldout(setup, start.root, start.index)]
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if setup.ranks.leads:
            print(f"ltx-train: no clips of eval.prompts and eval.samples: {error}; the run goes on", file=sys.stderr)
        return None
    return TrainingClips(setup, start.folder, planned) if planned else None


def _open_metrics(setup: Setup, start: RunStart) -> Metrics | None:
    """On rank 0 alone. `lead` broadcasts what its work returns, and open files cannot be sent: the work puts them into
    a list instead and returns nothing."""
    opened: list[Metrics] = []

    def open_files() -> None:
        sinks = trackers.sinks(setup.config, start.folder, start.step)
        opened.append(Metrics(start.folder, start.step, sinks))

    setup.ranks.lead(open_files)
    return opened[0] if opened else None


def _cadence(setup: Setup) -> Cadence:
    config = setup.config
    return Cadence(
        steps=config.optim.steps, log_every=config.logger.every, evaluate_every=config.eval.interval,
        save_every=config.checkpoint.interval,
        generate_every=config.eval.sample_interval or config.eval.interval or config.optim.steps,
    )  # fmt: skip


def step_recipe(
    setup: Setup, transformer: Transformer, updates: Updates, *, detailed: Callable[[int], bool] = lambda _step: False
) -> StepRecipe:  # fmt: skip
    """The optimizer step of an opened transformer, as CUDA graphs where the setup has them."""
    plain = partial(objective.backward, update_builder.predictor(transformer, updates))
    graphs = model_builder.pass_graphs(setup, transformer, updates.accumulating)
    ema = setup.config.adapter.ema
    recipe = plain_recipe(setup, plain if graphs is None else graphs, updates)
    return replace(
        recipe, release=recipe.release if graphs is None else graphs.release, detailed=detailed,
        set_dropout_keys=adapter.DropoutKeys(transformer).set,
        average=Average(adapter.trainable_parameters(transformer), ema) if ema else None,
    )  # fmt: skip


def plain_recipe(setup: Setup, backward: Callable[[MicroBatch], StepResult], updates: Updates) -> StepRecipe:
    """The optimizer step around any forward and backward pass, without what belongs to our own transformer: keyed
    dropout, a moving average, CUDA graphs."""
    config, loss = setup.config, setup.config.loss
    goal = Objective(
        modes=configuration.training_modes(config), sigma=from_config.sigma_distribution(config),
        token_weights=dict(loss.token_weights), seed=config.run.seed,
    )  # fmt: skip
    balance = Balance(
        video=loss.video_weight, audio=loss.audio_weight, levels=loss.weighting,
        decay=loss.balance_decay if loss.balance == "auto" else None, device=setup.device,
    )  # fmt: skip
    return StepRecipe(
        objective=goal, backward=backward, release=lambda: None, set_dropout_keys=lambda _keys: None, updates=updates,
        schedule=from_config.schedule(config), clip=config.optim.clip,
        micro_batches=configuration.micro_batches(config, setup.ranks.world), ranks=setup.ranks, device=setup.device,
        balance=balance, average=None,
        spikes=Spikes(config.optim.skip_spikes, setup.device) if config.optim.skip_spikes else None,
        lockstep=setup.sharing.lockstep, detailed=lambda _step: False, flops=_flops(setup),
    )  # fmt: skip


def _flops(setup: Setup) -> Callable[[ModelInputs], float]:
    """The model's FLOPs for a micro-batch on this rank, from its numbers of tokens."""
    size = sizes.sizes(model_source.skeleton(setup.config))

    def count(inputs: ModelInputs) -> float:
        video, audio = (0 if m is None else m.latent.shape[1] for m in (inputs.video, inputs.audio))
        present = inputs.video or inputs.audio
        assert present is not None
        work = sizes.Workload(batch=present.latent.shape[0], video=video, audio=audio, text=present.context.shape[1])
        return duration.model_flops(size, work, full=setup.sharing.full) / setup.sharing.sequence

    return count


def _peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 rate by its datasheet; None on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return card_of_device(properties.name, properties.total_memory / GIB).bf16_tflops * 1e12


def _verify(checkpoint: Path, ranks: Ranks) -> None:
    """Each rank verifies a part of the files; a problem of one rank ends all of them."""
    problem: str | None = None
    try:
        manifest.verify(checkpoint, ranks.rank, ranks.world)
    except DataError as error:
        problem = str(error)
    problems = [text for text in ranks.gather(problem) if text]

    def refuse() -> None:
        if problems:
            raise DataError(problems[0])

    ranks.lead(refuse)


def _outside(
    setup: Setup, start: RunStart, state: RunState, transformer: Transformer, *, metrics: Metrics | None,
    neutral: Neutral, watchdog: Watchdog,
) -> Outside:  # fmt: skip
    config, checkpoint = setup.config, setup.config.checkpoint
    publish = partial(publishing.publish, config, start.folder, base=state.base)
    writer = CheckpointWriter(
        start.folder / "checkpoints", keep=checkpoint.keep, waits=checkpoint.on_full == "wait",
        save_every=checkpoint.interval, settings=configuration.dump(config), publish=publish, ranks=setup.ranks,
    )  # fmt: skip
    return Outside(
        metrics=metrics, page=None if metrics is None else partial(run_page.write, config, start.folder),
        evaluate=_evaluate(setup, start, state, transformer, neutral), generate=None, writer=writer,
        watchdog=watchdog, profiler=None, restarts=int(os.environ.get("LTX_TRAIN_RESTARTS", "0")),
        prepares_saves=setup.sharing.saves_slices,
    )  # fmt: skip


def _evaluate(
    setup: Setup, start: RunStart, state: RunState, transformer: Transformer, neutral: Neutral
) -> Callable[[int], Mapping[str, float]] | None:
    """What measures a step; None when nothing is to be measured."""
    recipe = state.step.recipe
    published = nullcontext if recipe.average is None else recipe.average.applied
    measure = heldout_measurement.evaluator(
        setup,
        start.folder,
        start.root,
        start.index,
        transformer=transformer,
        neutral=neutral,
        published=published,
    )
    if measure is None:
        return None

    def evaluate(step: int) -> Mapping[str, float]:
        recipe.release()  # measuring needs the memory that CUDA graphs hold
        return measure(step)

    return evaluate


def _generate(
    training_clips: TrainingClips, state: RunState, transformer: Transformer, metrics: Metrics | None
) -> Callable[[int], Mapping[str, float]]:
    recipe = state.step.recipe
    published = nullcontext if recipe.average is None else recipe.average.applied

    def generate(step: int) -> Mapping[str, float]:
        recipe.release()  # generating needs the memory that CUDA graphs hold
        with published():
            clips, seconds = training_clips.generate(transformer, step)
        if metrics is not None:
            for clip in clips:
                metrics.media(step, clip)
        return seconds

    return generate


def _data(setup: Setup, start: RunStart) -> ShardData:
    config, optim = setup.config, setup.config.optim
    assert optim.global_batch is not None
    order = training_order(
        start.index, optim.global_batch, config.run.seed, config.data.limit,
        window=config.data.shuffle if config.data.order == "stream" else None,
    )  # fmt: skip
    modes = [mode for _, mode in configuration.training_modes(config)]
    request = from_config.read_request(config, modes)
    reader = Reader(start.root, start.index, seed=config.run.seed, request=request)
    return ShardData(
        reader, order, micro_batch=optim.batch_size, first_step=start.step, last_step=optim.steps,
        workers=config.data.workers, rank=setup.sharing.reader(setup.ranks.rank), world=setup.sharing.readers,
        max_bad=config.data.max_bad_fraction, ahead=from_config.shards_ahead(config, start.index),
    )  # fmt: skip
