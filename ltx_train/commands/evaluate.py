"""`ltx-train evaluate`: measures a run's checkpoint, or compares many adapters, and writes one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ltx_train import config as configuration
from ltx_train.assembly import (
    comparison,
    from_config,
    model_builder,
    neutral_references,
    planned_clips,
    resolve,
    run_page,
    trackers,
)
from ltx_train.assembly.checked_data import open_heldout
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.heldout_measurement import Measurement
from ltx_train.assembly.run_clips import RunClips
from ltx_train.assembly.saved_run import open_run
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config
from ltx_train.contracts import Clip, Exit
from ltx_train.evaluation import alike, kept
from ltx_train.evaluation.kept import Evaluated
from ltx_train.evaluation.rows import BASE, CORRECT, OFF, WRONG, Row, gained, has, paired
from ltx_train.model.transformer import Transformer
from ltx_train.training.tracking.metrics import Metrics, read_rows


def run(config: Config) -> int:
    """Writes the same numbers to the page, to metrics.jsonl and to W&B."""
    if config.checkpoints is not None:
        page, first = comparison.compare(config)
        close(page, sample_command(first))
        return Exit.DONE
    folder = from_config.run_dir(config)
    trained_with, checkpoint = open_run(folder, config.export.step)
    # Use the precision of the run. When all weights are trained, the strategy of the run decides it.
    continued = configuration.continued(config, trained_with, 1)
    setup = forward_only(resolve.with_strategy_of(continued, trained_with))
    config = setup.config
    configuration.refuse_drift(trained_with, config, folder)
    root, index = open_heldout(config)
    clips = RunClips(setup, folder / "samples", planned_clips.of_heldout(setup, root, index))
    measurement = Measurement(
        setup=setup, root=root, index=index, neutral=neutral_references.of_heldout(setup, root, index)
    )
    transformer = model_builder.open_saved(setup, checkpoint)
    rows, masses, step = measurement.rows(transformer), measurement.masses(transformer), checkpoint.step
    noise, strengths = measurement.repeated(transformer, rows), measurement.by_strength(transformer, rows)
    made = _generate(clips, transformer, step, has_base=not setup.sharing.full) if config.eval.samples else []
    values = {**measurement.summary(rows, masses), **noise}
    kept.record(
        folder,
        Evaluated(
            step=step, rows=rows, masses=masses, grid=measurement.grid, likeness=measurement.likeness(),
            by_clip=index.by_clip, noise=noise, strengths=strengths,
        ),
    )  # fmt: skip
    _record(config, folder, values, made, step)
    for strength, some in strengths.items():
        print(f"strength {strength:<8g}{_at_strength(some)}")
    print("\n".join(verdict.text for verdict in run_page.conclusions(folder)))
    close(folder / run_page.NAME, f"ltx-train export {folder}")
    return Exit.DONE


def _at_strength(rows: Sequence[Row]) -> str:
    gap = f", gained gap {gained(rows, WRONG)}" if has(rows, OFF[WRONG]) else ""
    return f"adapter on minus off {paired(rows, CORRECT, BASE)}{gap}"


def _generate(clips: RunClips, transformer: Transformer, step: int, *, has_base: bool) -> list[Clip]:
    """The held-out clips of the base, once, and of the step."""
    if has_base:
        clips.with_base(transformer)
    return clips.generate(transformer, f"step-{step:06d}", f"step {step}")


def _record(config: Config, folder: Path, values: dict[str, float], clips: Sequence[Clip], step: int) -> None:
    """Adds the numbers to the run's metrics, writes the page with them, and passes all to the trackers."""
    # `Metrics` removes rows after its first step, but rows of later steps must stay.
    newest = max((int(row["step"]) for row in read_rows(folder / "metrics.jsonl")), default=step)
    last = max(step, newest)
    metrics = Metrics(folder, last, trackers.sinks(config, folder, last))
    metrics.write(step, values)
    # The page has no step, and W&B takes nothing of an earlier step after it.
    for clip in clips:
        metrics.media(last, clip)
    metrics.page(run_page.write(config, folder))
    metrics.close()
    for name, value in values.items():
        if name != alike.MEASURED_ON:
            print(f"{name:<32}{value:+.5f}")
