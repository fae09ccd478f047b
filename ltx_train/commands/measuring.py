"""Held-out measurement as `fit` and `evaluate` do it: the same clips, levels, noise and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ltx_train.commands import session
from ltx_train.config import Config
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.reader import Reader
from ltx_train.evaluation import attention_mass, heldout, history, likeness, verdicts
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.rows import BASE, CORRECT, WRONG, Grid, Row, summary
from ltx_train.evaluation.verdicts import Verdict
from ltx_train.model.transformer import Transformer
from ltx_train.training.ranks import ALONE, Ranks
from ltx_train.training.tracking import read_rows


@dataclass
class Measurement:
    """The held-out measurement of one run on one rank. The base is measured once: its numbers cannot change."""

    config: Config
    root: Path
    index: Index
    ranks: Ranks = ALONE
    _base: list[Row] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.grid: Grid = session.grid(self.config, self.index)
        self._settings = session.evaluation(self.config, self.grid)
        # Ranks that share the blocks or the tokens have to pass through the model together: each measures everything.
        self._apart = self.config.strategy.name != "zero3" and self.config.strategy.sequence == 1
        self._share = (self.ranks.rank, self.ranks.world) if self._apart else (0, 1)

    def rows(self, transformer: Transformer, *, with_base: bool = True) -> list[Row]:
        """Of the whole split, on every rank."""
        with_base = with_base and self._base is None and self.config.adapter.kind == "lora"
        own = heldout.measure(
            transformer, str(self.root), self.index, self._settings, self._device, with_base=with_base,
            share=self._share,
        )  # fmt: skip
        everyone = [row for rows in self.ranks.gather(own) for row in rows] if self._apart else own
        if with_base:
            self._base = [row for row in everyone if row.arm == BASE]
            return everyone
        return everyone + (self._base or [])

    def masses(self, transformer: Transformer) -> list[Mass]:
        """Attention on the references at the lowest, middle and highest of the main levels."""
        if not self.config.eval.attention:
            return []
        levels = self.grid.main
        picked = sorted({levels[0], levels[len(levels) // 2], levels[-1]})
        own = attention_mass.measure(
            transformer, str(self.root), self.index, self._settings, picked, self._device, self._share
        )
        return [mass for masses in self.ranks.gather(own) for mass in masses] if self._apart else own

    def likeness(self) -> float | None:
        """How alike references and their own targets are beyond chance; None without references."""
        settings = self._settings
        if not settings.mode.references:
            return None
        reader = Reader(self.root, self.index, seed=settings.seed, wants=heldout.wants(settings))
        found: dict[str, list[float]] = {}
        for batch in heldout.batches(self.index, settings):
            for arm in heldout.arms(reader, batch, settings, with_base=False):
                found.setdefault(arm.name, []).extend(likeness.cosines(settings.mode, arm.batch))
        return likeness.beyond_chance(found.get(CORRECT, []), found.get(WRONG, []))

    @property
    def _device(self) -> torch.device:
        return session.device(self.config, self.ranks.local if self.ranks.world > 1 else None)


def evaluator(
    config: Config, folder: Path, root: Path, index: Index, transformer: Transformer, ranks: Ranks,
    published: Callable[[], AbstractContextManager[None]] = nullcontext, show: Callable[[int], None] | None = None,
) -> Callable[[int], Mapping[str, float]] | None:  # fmt: skip
    """What training calls to measure, or None when nothing is to be measured; every identity's loss goes into the
    run's folder. published: puts the weights in place that would be published. show: makes something to look at of
    them, on the leading rank."""
    if config.eval.interval == 0 or not index.split(HELDOUT):
        return None
    measurement = Measurement(config, root, index, ranks)

    def evaluate(step: int) -> Mapping[str, float]:
        with published():
            rows, masses = measurement.rows(transformer), measurement.masses(transformer)
            if show is not None and ranks.leads:
                show(step)
        if ranks.leads:
            history.record(folder, history.of_rows(step, [r for r in rows if r.sigma in measurement.grid.main]))
        return summary(rows, measurement.grid) | attention_mass.summary(masses)

    return evaluate


def course(folder: Path) -> list[Verdict]:
    """What a run's measurements over its steps say."""
    rows = read_rows(folder / "metrics.jsonl")
    losses = {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}
    return verdicts.of_history(history.read(folder), losses)
