"""`ltx-train evaluate checkpoints=...`: many adapters and the base under the same noise, in one page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from ltx_train import config as configuration
from ltx_train.commands import planning, session, transformers
from ltx_train.commands.check import refuse_bad
from ltx_train.commands.measuring import Measurement
from ltx_train.commands.previews import Previews
from ltx_train.config import Config, ConfigError
from ltx_train.contracts import DataError, Exit
from ltx_train.data.audit import audit
from ltx_train.data.index import HELDOUT
from ltx_train.evaluation import report, verdicts
from ltx_train.evaluation.ranking import BEST
from ltx_train.evaluation.report import Report, Subject
from ltx_train.evaluation.rows import BASE, CORRECT, mean
from ltx_train.model import adapter, export, lora_file
from ltx_train.model.loaders import TRANSFORMER_PREFIX
from ltx_train.model.transformer import Transformer
from ltx_train.training.tracking import read_rows

PAGE = "comparison.html"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A LoRA file: its name on the page, and the step of its run if it has one."""

    name: str
    path: Path
    step: int | None


def run(config: Config) -> int:
    """Best first; the base is an arm of every one. The page lies beside the first run, or the first file."""
    found = candidates(config.checkpoints)
    folder = _folder(found[0].path)
    config = _settled(config, folder)
    root, index, stale = session.prepared(config)
    refuse_bad(audit(root, index, session.asked(config), stale), root)
    if not index.split(HELDOUT):
        raise DataError(f"nothing is held out in {root}: set data.heldout_speakers and prepare again")
    transformer = transformers.opened(config)
    measurement, previews = Measurement(config, root, index), Previews(config, root, index)
    subjects: list[Subject] = []
    base = _on_base(transformer, measurement, previews, folder)
    for candidate in found:
        print(f"measuring {candidate.name}", flush=True)
        subjects.append(_measured(candidate, config, transformer, measurement, previews, base, folder))
    subjects.sort(key=lambda s: mean([r for r in s.rows if r.sigma in measurement.grid.main], CORRECT).mean)
    said = verdicts.of_rows(subjects[0].rows, measurement.grid, measurement.likeness())
    facts = {
        "mode": ", ".join(f"{k} {v}" for k, v in session.mode_facts(config).items()),
        "base": config.model.path or f"random {config.model.preset}", "data": str(root),
        "held out": f"{len(index.split(HELDOUT))} clips, the same for every adapter",
    }  # fmt: skip
    page = folder / PAGE
    metrics = read_rows(folder / "metrics.jsonl")
    references = previews.references(folder / "samples" / "references")
    report.write(
        page, Report("comparison", facts, metrics, [*subjects, base], measurement.grid, said, references=references)
    )
    for subject in subjects:
        loss = mean([r for r in subject.rows if r.sigma in measurement.grid.main], CORRECT)
        print(f"{loss.mean:.5f} ± {loss.half:.5f}  {subject.name}")
    print(f"wrote {page}")
    return Exit.DONE


def candidates(asked: Any) -> list[Candidate]:
    """LoRA files of run folders, of folders of runs, of patterns, or named one by one.

    ConfigError names what holds none.
    """
    listed: Sequence[str] = [asked] if isinstance(asked, str) else [str(a) for a in asked]
    found: dict[Path, Candidate] = {}
    for entry in listed:
        paths = sorted(p for match in sorted(glob(entry)) for p in _files(Path(match)))
        if not paths:
            raise ConfigError(
                f"checkpoints={entry}: no LoRA there; give a run's folder, a pattern or .safetensors files"
            )
        for path in paths:
            found.setdefault(path.resolve(), _candidate(path))
    return list(found.values())


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for pattern in ("adapters/step-*.safetensors", "*/adapters/step-*.safetensors", "step-*.safetensors"):
        yield from (p for p in place.glob(pattern) if p.name != BEST and ".tmp-" not in p.name)


def _candidate(path: Path) -> Candidate:
    step = path.stem.removeprefix("step-")
    if path.parent.name == "adapters" and step.isdigit():
        run_folder = path.parent.parent
        return Candidate(f"{run_folder.parent.name}/{run_folder.name} step {int(step)}", path, int(step))
    return Candidate(path.name, path, None)


def _folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "adapters" else path.parent


def _settled(config: Config, folder: Path) -> Config:
    """The run's own model, mode, data and loss; the command line says where they are if they have moved."""
    saved = folder / "config.yaml"
    if saved.is_file():
        own = configuration.load(saved)
        there = Path(own.data.root).is_dir() or not config.data.root
        data = own.data if there else replace(own.data, root=config.data.root)
        known = own.model.path is None or Path(own.model.path).is_file()
        model = own.model if known else replace(own.model, path=config.model.path)
        config = replace(config, model=model, mode=own.mode, data=data, loss=own.loss, sigma=own.sigma, run=own.run)
    elif not config.data.root:
        raise ConfigError(f"{folder} is no run's folder: say with experiment=..., data.root=... what to measure on")
    # Which adapter it is comes out of each file; only that there is one matters here.
    settled, _ = planning.settle(configuration.continued(config, None, 1), training=False)
    return settled


def _on_base(transformer: Transformer, measurement: Measurement, previews: Previews, folder: Path) -> Subject:
    rows = measurement.rows(transformer, with_base=False)
    return Subject("base", None, rows, clips=previews.generate(transformer, folder / "samples" / "base"))


def _measured(
    candidate: Candidate, config: Config, transformer: Transformer, measurement: Measurement, previews: Previews,
    base: Subject, folder: Path,
) -> Subject:  # fmt: skip
    tensors, metadata = lora_file.read_lora(candidate.path)
    trained_on = metadata.get("base_fingerprint")
    if trained_on is not None and trained_on != session.weights(config).fingerprint(TRANSFORMER_PREFIX):
        raise DataError(f"{candidate.path} was trained on another base than {config.model.path}: compare them apart")
    export.bind(transformer, tensors)
    try:
        off = [replace(row, arm=BASE) for row in base.rows if row.arm == CORRECT]
        rows = [*measurement.rows(transformer.eval(), with_base=False), *off]
        masses = measurement.masses(transformer)
        name = candidate.path.stem if candidate.step is None else f"step-{candidate.step:06d}"
        clips = previews.generate(transformer, folder / "samples" / name)
    finally:
        adapter.detach(transformer)
    return Subject(candidate.name, candidate.step, rows, masses, clips)
