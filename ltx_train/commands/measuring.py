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
from ltx_train.evaluation import attention_mass, heldout
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.rows import BASE, Grid, Row, summary
from ltx_train.model.transformer import Transformer
from ltx_train.training.ranks import ALONE, Ranks


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
        self._share = (self.ranks.rank, self.ranks.world)

    def rows(self, transformer: Transformer) -> list[Row]:
        """Of the whole split, on every rank."""
        with_base = self._base is None and self.config.adapter.kind == "lora"
        own = heldout.measure(
            transformer, str(self.root), self.index, self._settings, self._device, with_base=with_base,
            share=self._share,
        )  # fmt: skip
        everyone = [row for rows in self.ranks.gather(own) for row in rows]
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
        return [mass for masses in self.ranks.gather(own) for mass in masses]

    def values(self, transformer: Transformer) -> dict[str, float]:
        """By their documented names."""
        return summary(self.rows(transformer), self.grid) | attention_mass.summary(self.masses(transformer))

    @property
    def _device(self) -> torch.device:
        return session.device(self.config, self.ranks.local if self.ranks.world > 1 else None)


def evaluator(
    config: Config, root: Path, index: Index, transformer: Transformer, ranks: Ranks,
    published: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[int], Mapping[str, float]] | None:  # fmt: skip
    """What training calls to measure, or None when nothing is to be measured. published: puts the weights in place
    that would be published."""
    if config.eval.interval == 0 or not index.split(HELDOUT):
        return None
    measurement = Measurement(config, root, index, ranks)

    def evaluate(_step: int) -> Mapping[str, float]:
        with published():
            return measurement.values(transformer)

    return evaluate
