"""`evaluate checkpoints=...`: measures many adapters and the base with the same noise, on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from ltx_train import config as configuration
from ltx_train.assembly import from_config, model_builder, model_source, neutral_references, planned_clips, run_clips
from ltx_train.assembly.checked_data import open_heldout
from ltx_train.assembly.heldout_measurement import Measurement
from ltx_train.assembly.run_clips import RunClips
from ltx_train.assembly.setup import Setup, forward_only
from ltx_train.config import Config, ConfigError
from ltx_train.contracts import DataError
from ltx_train.data.index import HELDOUT
from ltx_train.evaluation import report, verdicts
from ltx_train.evaluation.ranking import BEST
from ltx_train.evaluation.report import Report, Subject
from ltx_train.evaluation.rows import CORRECT, OFF, mean
from ltx_train.model import adapter, export, lora_file
from ltx_train.model.transformer import Transformer
from ltx_train.training.tracking.metrics import read_rows

PAGE = "comparison.html"
S = TypeVar("S", bound=Any)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A LoRA file: its name on the page, and its run and step if it is a checkpoint of a run."""

    name: str
    path: Path
    run: str = ""
    step: int | None = None


def compare(config: Config) -> tuple[Path, Path]:
    """Measures all candidates. Returns the page, and the file of the adapter with the lowest held-out loss.

    The base is an arm of every adapter. The page is in the folder of the first run, or of the first file.
    """
    listed = candidates(config.checkpoints)
    folder = _folder(listed[0].path)
    setup = forward_only(configuration.continued(_with_run_settings(config, folder), None, 1))
    config = setup.config
    root, index = open_heldout(config)
    samples = folder / "samples" / "comparison"
    clips = RunClips(setup, samples, planned_clips.of_heldout(setup, root, index)) if config.eval.samples else None
    measurement = Measurement(
        setup=setup, root=root, index=index, neutral=neutral_references.of_heldout(setup, root, index)
    )
    transformer = model_builder.open_frozen(setup)
    arms = _Arms(setup=setup, transformer=transformer, measurement=measurement, clips=clips)
    base = arms.base()
    subjects: list[tuple[Subject, Candidate]] = []
    for number, candidate in enumerate(listed, 1):
        print(f"measuring {candidate.name}", flush=True)
        subjects.append((arms.adapter(candidate, base, f"{number:02d}"), candidate))
    grid = arms.measurement.grid
    subjects.sort(key=lambda pair: mean([r for r in pair[0].rows if r.sigma in grid.main], CORRECT).mean)
    ranked = [subject for subject, _ in subjects]
    facts = {
        "mode": ", ".join(f"{k} {v}" for k, v in from_config.mode_facts(config).items()),
        "base": config.model.path or f"random {config.model.preset}", "data": str(root),
        "held out": f"{len(index.split(HELDOUT))} clips, the same for every adapter",
    }  # fmt: skip
    page = folder / PAGE
    content = Report(
        title="comparison", facts=facts, metrics=read_rows(folder / "metrics.jsonl"), subjects=[*ranked, base],
        grid=grid,
        verdicts=verdicts.of_rows(ranked[0].rows, grid, arms.measurement.likeness(), by_clip=index.by_clip),
        clips=run_clips.found(samples),
    )  # fmt: skip
    report.write(page, content)
    for subject in ranked:
        loss = mean([r for r in subject.rows if r.sigma in grid.main], CORRECT)
        print(f"{loss.plain}  {subject.name}")
    return page, subjects[0][1].path


def candidates(checkpoints: Any) -> list[Candidate]:
    """Lists LoRA files from run folders, folders of runs, patterns and file names.

    ConfigError names an entry without LoRA files.
    """
    if not checkpoints or not isinstance(checkpoints, (str, Sequence)):
        raise ConfigError(f"checkpoints={checkpoints}: give a run's folder, a pattern, .safetensors files, or a list")
    entries: Sequence[Any] = [checkpoints] if isinstance(checkpoints, str) else checkpoints
    listed = [str(entry) for entry in entries]
    by_file: dict[Path, Candidate] = {}
    for entry in listed:
        paths = sorted(p for match in sorted(glob(entry)) for p in _files(Path(match)))
        if not paths:
            raise ConfigError(
                f"checkpoints={entry}: no LoRA there; give a run's folder, a pattern or .safetensors files"
            )
        for path in paths:
            by_file.setdefault(path.resolve(), _candidate(path))
    names = Counter(candidate.name for candidate in by_file.values())
    return [c if names[c.name] == 1 else replace(c, name=str(c.path)) for c in by_file.values()]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for pattern in ("adapters/step-*.safetensors", "*/adapters/step-*.safetensors", "step-*.safetensors"):
        yield from (p for p in path.glob(pattern) if p.name != BEST and ".tmp-" not in p.name)


def _candidate(path: Path) -> Candidate:
    step = path.stem.removeprefix("step-")
    if path.parent.name == "adapters" and step.isdigit():
        run_folder = path.parent.parent
        run = f"{run_folder.parent.name}/{run_folder.name}"
        return Candidate(f"{run} step {int(step)}", path, run, int(step))
    return Candidate(path.name, path)


def _folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "adapters" else path.parent


def _with_run_settings(config: Config, folder: Path) -> Config:
    """The configuration with model, mode, data, loss and noise levels of the run. What the command line sets wins."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        if not config.data.root:
            raise ConfigError(f"{folder} is no run's folder: choose the data with experiment=..., data.root=...")
        return config
    run = configuration.load(saved)
    default = configuration.compose_config([])
    sections = {
        name: _overlaid(getattr(run, name), getattr(config, name), getattr(default, name))
        for name in ("model", "mode", "data", "loss", "sigma")
    }
    return replace(config, **sections, run=run.run)


def _overlaid(run: S, given: S, default: S) -> S:
    """A section of the run's settings with those that the command line changes from their defaults."""
    changed = {
        field.name: getattr(given, field.name)
        for field in fields(given)
        if getattr(given, field.name) != getattr(default, field.name)
    }
    return replace(run, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arms:
    """Measures and generates with the base and with each adapter on it. The base is loaded once."""

    setup: Setup
    transformer: Transformer
    measurement: Measurement
    clips: RunClips | None

    def base(self) -> Subject:
        if self.clips is not None:
            self.clips.generate(self.transformer, run_clips.BASE, run_clips.BASE)
        return Subject(name="base", step=None, rows=self.measurement.rows(self.transformer, with_base=False))

    def adapter(self, candidate: Candidate, base: Subject, column: str) -> Subject:
        """column: name of the folder of its clips. Raises DataError when the adapter was trained on another base."""
        tensors, metadata = lora_file.read_lora(candidate.path)
        config = self.setup.config
        if model_source.is_other_base(config, metadata):
            raise DataError(f"{candidate.path} was trained on another base than {config.model.path}: compare it apart")
        export.bind(self.transformer, tensors)
        try:
            base_rows = [replace(row, arm=OFF[row.arm]) for row in base.rows]
            rows = [*self.measurement.rows(self.transformer.eval(), with_base=False), *base_rows]
            masses = self.measurement.masses(self.transformer, with_base=False)
            if self.clips is not None:
                self.clips.generate(self.transformer, column, candidate.name)
        finally:
            adapter.detach(self.transformer)
        return Subject(name=candidate.name, run=candidate.run, step=candidate.step, rows=rows, masses=masses)
