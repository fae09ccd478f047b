"""`ltx-train evaluate`: measures a run's newest checkpoint on the held-out split and writes report.html."""

from __future__ import annotations

from pathlib import Path

from ltx_train import config as configuration
from ltx_train.commands import logging, planning, session, transformers
from ltx_train.commands.check import refuse_bad
from ltx_train.commands.export import open_run
from ltx_train.commands.measuring import Measurement
from ltx_train.config import Config
from ltx_train.contracts import DataError, Exit
from ltx_train.data.audit import audit
from ltx_train.data.index import HELDOUT
from ltx_train.evaluation import report
from ltx_train.evaluation.rows import summary
from ltx_train.model import adapter
from ltx_train.training.checkpointing import Checkpoint
from ltx_train.training.tracking import Metrics, read_rows


def run(config: Config) -> int:
    """The same numbers go to the page, to metrics.jsonl and to W&B."""
    folder = session.run_dir(config)
    trained_with, checkpoint = open_run(folder, config.export.step)
    config, _ = planning.settle(configuration.continued(config, trained_with, 1), training=False)
    configuration.refuse_drift(trained_with, config, folder)
    root, index, stale = session.prepared(config)
    refuse_bad(audit(root, index, session.asked(config), stale), root)
    if not index.split(HELDOUT):
        raise DataError(f"nothing is held out in {root}: set data.heldout_speakers and prepare again")
    transformer = transformers.trainable(config)
    adapter.load_state(transformer, checkpoint.weights)
    measurement = Measurement(config, root, index)
    rows = measurement.rows(transformer)
    _record(config, folder, checkpoint.step, summary(rows, measurement.grid))
    page = folder / "report.html"
    facts = _facts(config, checkpoint, folder)
    report.write(
        page, report.Report(f"{folder.parent.name}/{folder.name}", facts, read_rows(folder / "metrics.jsonl"), rows)
    )
    print("\n".join(report.verdict(rows)))
    print(f"wrote {page}")
    return Exit.DONE


def _record(config: Config, folder: Path, step: int, values: dict[str, float]) -> None:
    # Only this step's row is added: rows of later steps, if any, stay.
    newest = max((int(row["step"]) for row in read_rows(folder / "metrics.jsonl")), default=step)
    metrics = Metrics(folder, max(step, newest), logging.sinks(config, folder, max(step, newest)))
    metrics.write(step, values)
    metrics.close()
    for name, value in values.items():
        print(f"{name:<32}{value:+.5f}")


def _facts(config: Config, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    mode = session.mode_facts(config)
    trained = f"{config.adapter.kind}, {len(checkpoint.weights)} tensors"
    if config.adapter.kind == "lora":
        trained += f", rank {config.adapter.rank}, alpha {config.adapter.alpha:g}"
    return {
        "folder": str(folder),
        "step": str(checkpoint.step),
        "base": config.model.path or f"random {config.model.preset}",
        "mode": ", ".join(f"{k} {v}" for k, v in mode.items()),
        "trained": trained,
        "optimizer": f"{config.optim.name}, {config.optim.schedule} from {config.optim.lr:g}",
        "data": config.data.root,
        "noise levels": ", ".join(f"{s:g}" for s in config.eval.sigmas),
    }
