"""`ltx-train evaluate`: measures a run's checkpoint, or compares many adapters, and writes one page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ltx_train import config as configuration
from ltx_train.commands import compare, logging, planning, session, transformers
from ltx_train.commands.check import refuse_bad
from ltx_train.commands.export import open_run
from ltx_train.commands.measuring import Measurement, course
from ltx_train.commands.previews import Previews
from ltx_train.config import Config
from ltx_train.contracts import DataError, Exit
from ltx_train.data.audit import audit
from ltx_train.data.index import HELDOUT
from ltx_train.evaluation import attention_mass, ranking, report, verdicts
from ltx_train.evaluation.report import Report, Subject
from ltx_train.evaluation.rows import summary
from ltx_train.model import adapter
from ltx_train.training.checkpointing import Checkpoint
from ltx_train.training.tracking import Metrics, read_rows


def run(config: Config) -> int:
    """The same numbers go to the page, to metrics.jsonl and to W&B."""
    if config.checkpoints is not None:
        return compare.run(config)
    folder = session.run_dir(config)
    trained_with, checkpoint = open_run(folder, config.export.step)
    config, _ = planning.settle(configuration.continued(config, trained_with, 1), training=False)
    configuration.refuse_drift(trained_with, config, folder)
    # In the arithmetic of the run, which its strategy decides where all weights are trained.
    config = replace(config, strategy=replace(config.strategy, name=trained_with.strategy.name))
    root, index, stale = session.prepared(config)
    refuse_bad(audit(root, index, session.asked(config), stale), root)
    if not index.split(HELDOUT):
        raise DataError(f"nothing is held out in {root}: set data.heldout_speakers and prepare again")
    transformer = transformers.trainable(config, fresh=False)
    adapter.load_state(transformer, checkpoint.published)
    measurement = Measurement(config, root, index)
    rows, masses = measurement.rows(transformer), measurement.masses(transformer)
    previews = Previews(config, root, index)
    clips = previews.generate(transformer, folder / "samples" / f"step-{checkpoint.step:06d}")
    subject = Subject(f"step {checkpoint.step}", checkpoint.step, rows, masses, clips)
    said = verdicts.of_rows(rows, measurement.grid, measurement.likeness()) + course(folder)
    values = summary(rows, measurement.grid) | attention_mass.summary(masses)
    page = folder / "report.html"
    metrics = read_rows(folder / "metrics.jsonl")
    listed = ranking.table(ranking.ranked([*metrics, {"step": checkpoint.step, **values}], folder))
    report.write(
        page,
        Report(
            f"{folder.parent.name}/{folder.name}", _facts(config, checkpoint, folder), metrics, [subject],
            measurement.grid, said, listed, previews.references(folder / "samples" / "references"),
        ),
    )  # fmt: skip
    _record(config, folder, values, page, subject)
    print("\n".join(verdict.text for verdict in said))
    print(f"wrote {page}")
    return Exit.DONE


def _record(config: Config, folder: Path, values: dict[str, float], page: Path, subject: Subject) -> None:
    step = subject.step or 0
    # Only this step's row is added: rows of later steps, if any, stay.
    newest = max((int(row["step"]) for row in read_rows(folder / "metrics.jsonl")), default=step)
    last = max(step, newest)
    metrics = Metrics(folder, last, logging.sinks(config, folder, last))
    metrics.write(step, values)
    metrics.page(page)
    for clip in subject.clips:
        metrics.media(last, clip.path, clip.path.stem)
    metrics.close()
    for name, value in values.items():
        print(f"{name:<32}{value:+.5f}")


def _facts(config: Config, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    mode = session.mode_facts(config)
    trained = f"{config.adapter.kind}, {len(checkpoint.weights)} tensors"
    if config.adapter.kind == "lora":
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
