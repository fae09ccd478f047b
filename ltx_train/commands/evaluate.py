"""`ltx-train evaluate`: measures a run's checkpoint, or compares many adapters, and writes one page."""

from __future__ import annotations

from pathlib import Path

from ltx_train import config as configuration
from ltx_train.assembly import comparison, from_config, model_builder, prompted_clips, resolve, trackers
from ltx_train.assembly.checked_data import open_heldout
from ltx_train.assembly.closing import close, sample_command
from ltx_train.assembly.heldout_measurement import Measurement, course
from ltx_train.assembly.previews import Previews
from ltx_train.assembly.saved_run import open_run
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.evaluation import alike, ranking, report, verdicts
from ltx_train.evaluation.ranking import Ranking
from ltx_train.evaluation.report import Report, Subject
from ltx_train.model import adapter
from ltx_train.training.checkpoints.commit import Checkpoint
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
    transformer = model_builder.open_trainable(setup, fresh=False)
    adapter.load_state(transformer, checkpoint.published)
    measurement, previews = Measurement(setup, root, index), Previews(setup, root, index)
    rows, masses = measurement.rows(transformer), measurement.masses(transformer)
    clips = previews.generate(transformer, folder / "samples" / f"step-{checkpoint.step:06d}")
    subject = Subject(name=f"step {checkpoint.step}", step=checkpoint.step, rows=rows, masses=masses, clips=clips)
    conclusions = verdicts.of_rows(rows, measurement.grid, measurement.likeness(), by_clip=index.by_clip)
    conclusions += course(folder)
    values = measurement.summary(rows, masses)
    page = folder / "report.html"
    metrics = read_rows(folder / "metrics.jsonl")
    listed = ranking.ranked([*metrics, {"step": checkpoint.step, **values}], folder)
    report.write(
        page,
        Report(
            title=f"{folder.parent.name}/{folder.name}", facts=_facts(config, checkpoint, folder), metrics=metrics,
            subjects=[subject], grid=measurement.grid, verdicts=conclusions, ranking=listed,
            commands=_commands(listed, folder),
            references=previews.references(folder / "samples" / "references"),
            prompted=prompted_clips.of_run(trained_with, folder),
        ),
    )  # fmt: skip
    _record(config, folder, values, page, subject)
    print("\n".join(verdict.text for verdict in conclusions))
    close(page, f"ltx-train export {folder}")
    return Exit.DONE


def _record(config: Config, folder: Path, values: dict[str, float], page: Path, subject: Subject) -> None:
    step = subject.step or 0
    # `Metrics` removes rows after its first step, but rows of later steps must stay.
    newest = max((int(row["step"]) for row in read_rows(folder / "metrics.jsonl")), default=step)
    last = max(step, newest)
    metrics = Metrics(folder, last, trackers.sinks(config, folder, last))
    metrics.write(step, values)
    # The page has no step, and W&B takes nothing of an earlier step after it.
    for clip in subject.clips:
        metrics.media(last, clip.path, clip.path.stem)
    metrics.page(page)
    metrics.close()
    for name, value in values.items():
        if name != alike.MEASURED_ON:
            print(f"{name:<32}{value:+.5f}")


def _commands(listed: Ranking, folder: Path) -> list[str]:
    """Commands for the best step whose adapter is kept."""
    best = next((e for e in listed.entries if e.kept is not None and e.kept.suffix == ".safetensors"), None)
    if best is None:
        return []
    return [f"ltx-train export {folder} export.step={best.step}", sample_command(best.kept)]


def _facts(config: Config, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    mode = from_config.mode_facts(config)
    trained = f"{resolve.trained_kind(config)}, {len(checkpoint.weights)} tensors"
    if not resolve.trains_all_weights(config):
        trained += f", rank {config.adapter.rank}, alpha {config.adapter.alpha:g}"
    merged = f" + {config.model.merge_strength:g} x {config.model.merge}" if config.model.merge else ""
    return {
        "folder": str(folder),
        "step": f"{checkpoint.step}{' (moving average)' if checkpoint.average else ''}",
        "base": (config.model.path or f"random {config.model.preset}") + merged,
        "mode": ", ".join(f"{k} {v}" for k, v in mode.items()),
        "trained": trained,
        "optimizer": f"{config.optim.name}, {config.optim.schedule} from {config.optim.lr:g}",
        "noise levels": f"{config.sigma.kind}, {config.mode.sigma.value} by both modalities",
        "data": config.data.root,
    }
