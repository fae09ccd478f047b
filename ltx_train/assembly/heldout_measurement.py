"""Held-out measurement for `fit` and `evaluate`: the same clips, noise levels, noise and metric names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ltx_train.assembly import from_config
from ltx_train.assembly.setup import Setup
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.reader import Reader
from ltx_train.evaluation import alike, attention_mass, heldout, history, likeness, verdicts
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.heldout import MeasurementSettings, Neutral
from ltx_train.evaluation.rows import CORRECT, OFF, WRONG, Grid, Row, noise, summary
from ltx_train.evaluation.verdicts import Verdict
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.training.tracking.metrics import read_rows

T = TypeVar("T")


@dataclass
class _Off:
    """What was measured with the adapter off; None before that."""

    rows: list[Row] | None = None
    masses: list[Mass] | None = None


@dataclass(kw_only=True)
class Measurement:
    """The held-out measurement of a run on one rank. The base is measured once, because its numbers cannot change.

    neutral: references of the neutral arm, none without that arm.
    """

    setup: Setup
    root: Path
    index: Index
    neutral: Neutral = field(default_factory=dict[tuple[str, tuple[int, ...]], Tensor])
    _off: _Off = field(default_factory=_Off, init=False)

    def __post_init__(self) -> None:
        config = self.setup.config
        self.grid: Grid = from_config.grid(config, self.index)
        settings = from_config.measurement_settings(config, self.grid)
        self._settings = replace(settings, neutral=bool(self.neutral))
        self._share = self.setup.share
        self.measured_on = heldout.measured_on(self.index, self._settings, self.grid.main)

    def rows(self, transformer: Transformer, *, with_base: bool = True) -> list[Row]:
        """Measures the complete held-out split. Returns its rows on every rank."""
        with_base = with_base and self._off.rows is None and not self.setup.sharing.full
        of_all_ranks = self._measured(transformer, self._settings, with_base=with_base)
        if with_base:
            self._off.rows = [row for row in of_all_ranks if row.arm in OFF.values()]
            return of_all_ranks
        return of_all_ranks + (self._off.rows or [])

    def repeated(self, transformer: Transformer, rows: Sequence[Row]) -> dict[str, float]:
        """Noise of repeated measuring by metric name: the correct and wrong arms again with other noise, eval.repeats
        times. rows: of the first measurement."""
        main = [row for row in rows if row.sigma in self.grid.main]
        others = [
            self._measured(transformer, self._few(repeat=number + 1), with_base=not self.setup.sharing.full)
            for number in range(self.setup.config.eval.repeats)
        ]
        return noise([main, *others])

    def by_strength(self, transformer: Transformer, rows: Sequence[Row]) -> dict[float, list[Row]]:
        """Rows of the main levels by the adapter's strength, those of `rows` (strength 1) among them; each with the
        base's. Empty without an adapter, or without strengths to measure."""
        strengths = [s for s in self.setup.config.eval.strengths if s not in (0, 1)]
        if self.setup.sharing.full or not strengths:
            return {}
        main = [row for row in rows if row.sigma in self.grid.main]
        base = [row for row in main if row.arm in OFF.values()]
        as_adapter = {off: on for on, off in OFF.items()}
        measured = {0.0: [*base, *(replace(row, arm=as_adapter[row.arm]) for row in base)], 1.0: main}
        for strength in strengths:
            with adapter.at_strength(transformer, strength):
                measured[strength] = [*self._measured(transformer, self._few(), with_base=False), *base]
        return dict(sorted(measured.items()))

    def _few(self, repeat: int = 0) -> MeasurementSettings:
        """The correct and wrong arms at the main levels alone."""
        return replace(
            self._settings, levels=self.grid.main, dropped=False, neutral=False, wrong_caption=False, repeat=repeat
        )

    def _measured(self, transformer: Transformer, settings: MeasurementSettings, *, with_base: bool) -> list[Row]:
        local = heldout.measure(
            transformer, str(self.root), self.index, settings, device=self.setup.device, with_base=with_base,
            share=self._share, neutral=self.neutral,
        )  # fmt: skip
        return self._of_all_ranks(local)

    def summary(self, rows: Sequence[Row], masses: Sequence[Mass]) -> dict[str, float]:
        """Metrics of a measurement, with what it was made of."""
        attention = attention_mass.summary(masses, self._off.masses or ())
        return {**summary(rows, self.grid), **attention, **self.measured_on}

    def masses(self, transformer: Transformer, *, with_base: bool = True) -> list[Mass]:
        """Measures attention on the references at the lowest, middle and highest of the main noise levels; once with
        the adapter off, too."""
        if not self.setup.config.eval.attention:
            return []
        if with_base and self._off.masses is None and not self.setup.sharing.full:
            with adapter.disabled(transformer):
                self._off.masses = self._masses(transformer)
        return self._masses(transformer)

    def _masses(self, transformer: Transformer) -> list[Mass]:
        levels = self.grid.main
        picked = sorted({levels[0], levels[len(levels) // 2], levels[-1]})
        local = attention_mass.measure(
            transformer, str(self.root), self.index, self._settings, levels=picked, device=self.setup.device,
            share=self._share,
        )  # fmt: skip
        return self._of_all_ranks(local)

    def _of_all_ranks(self, local: list[T]) -> list[T]:
        """The results of all ranks. Those that share samples have the same: the first of them counts."""
        own = local if self.setup.ranks.rank % self.setup.sharing.sequence == 0 else []
        return [result for results in self.setup.ranks.gather(own) for result in results]

    def likeness(self) -> float | None:
        """Similarity of references to their own targets beyond chance; None without references."""
        settings = self._settings
        if not settings.mode.references:
            return None
        reader = Reader(self.root, self.index, seed=settings.seed, request=heldout.read_request(settings))
        cosines: dict[str, list[float]] = {}
        for batch in heldout.batches(self.index, settings):
            for arm in heldout.arms(reader, batch, settings, with_base=False):
                cosines.setdefault(arm.name, []).extend(likeness.cosines(settings.mode, arm.batch))
        return likeness.beyond_chance(cosines.get(CORRECT, []), cosines.get(WRONG, []))


def evaluator(
    setup: Setup, folder: Path, root: Path, index: Index, *, transformer: Transformer, neutral: Neutral,
    published: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[int], Mapping[str, float]] | None:  # fmt: skip
    """Returns a function that measures a step, or None when the run has no measurements. The function also writes the
    loss of every identity into the run's folder.

    published: a context in which the model has the weights to publish.
    """
    if setup.config.eval.interval == 0 or not index.split(HELDOUT):
        return None
    measurement = Measurement(setup=setup, root=root, index=index, neutral=neutral)

    def evaluate(step: int) -> Mapping[str, float]:
        with published():
            rows, masses = measurement.rows(transformer), measurement.masses(transformer)
        if setup.ranks.leads:
            measured = history.of_rows(step, [r for r in rows if r.sigma in measurement.grid.main])
            on = alike.of(measurement.measured_on)
            try:
                history.record(folder, replace(measured, on=on))
            except OSError as error:  # a full disk: the save after this tries again, and decides
                print(f"ltx-train: {folder / history.NAME} could not be written: {error}", file=sys.stderr)
        return measurement.summary(rows, masses)

    return evaluate


def course(folder: Path) -> list[Verdict]:
    """Verdicts on a run's measurements over its steps."""
    rows = read_rows(folder / "metrics.jsonl")
    losses = {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}
    return verdicts.of_history(history.read(folder), losses)
