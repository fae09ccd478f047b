"""The saves of a run: a snapshot of the complete state, a failure count over ranks, and a warning about slow disks.

Owns the steps around a background save. `background` writes the snapshot, `commit` makes it a valid checkpoint.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from ltx_train.contracts import DataError
from ltx_train.distributed.ranks import AgreedError, Ranks
from ltx_train.training.checkpoints.background import Publish, Saver
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.state import RunState

# How long training may wait for the previous save before the user is advised to save less often: seconds, and the share
# of the time between two saves.
_WAIT_S, _WAIT_SHARE = 1.0, 0.05


class CheckpointWriter:
    """folder: holds all checkpoints. failures: number of failed saves in a row that ends the run. save_every: the
    configured interval in steps, for the warning."""

    def __init__(
        self, folder: Path, *, keep: int, failures: int, save_every: int, publish: Publish, ranks: Ranks
    ) -> None:
        self._saver = Saver(folder, keep, publish, leads=ranks.leads)
        self._failures, self._save_every, self._ranks = failures, save_every, ranks
        self._saved = -1
        self._began = time.perf_counter()
        self._is_warned = False
        # Failed saves in a row, and the seconds for which the newest save blocked training.
        self.failed, self.blocked_s = 0, 0.0

    def begin(self, first_step: int) -> None:
        """Call before the first step. first_step: the step at which the run starts, which needs no save."""
        self._saved = first_step

    def prepare(self, state: RunState) -> None:
        """Allocates host memory for a sliced state. Call after the first step, when the optimizer has its moments."""
        state_slice = state.step.recipe.updates.state().slice
        assert state_slice is not None
        self._saver.prepare(state_slice)

    def save(self, state: RunState, *, must: bool) -> None:
        """Starts to save the current step. must: waits for the save and raises when it fails. Collective."""
        step = state.step
        if step.step == self._saved:
            return
        step.guard.check()
        began = time.perf_counter()
        self._wait(must=False)
        if self._save_every <= step.step - self._saved:
            self._warn(waited=time.perf_counter() - began, since=began - self._began)
        self._began = began
        live = self._live(state)
        if self._ranks.leads or live.slice is not None:
            self._saver.start(live, state.early_stop.best_step)
        self._saved = step.step
        self.blocked_s = time.perf_counter() - began
        if must:
            self._wait(must=True)

    def _live(self, state: RunState) -> Checkpoint:
        """The current state, with its tensors on the device."""
        recipe = state.step.recipe
        trained = recipe.updates.state()
        live = Checkpoint(
            step=state.step.step, weights=trained.weights, optimizer=trained.optimizer,
            notes=state.notes(self._ranks), average={} if recipe.average is None else recipe.average.tensors,
            slice=trained.slice,
        )  # fmt: skip
        # All ranks must use the same temporary folder.
        return live if trained.slice is None else replace(live, name=self._ranks.lead(lambda: live.name))

    def _warn(self, *, waited: float, since: float) -> None:
        """Warns once when a save takes longer than the interval between two saves. waited: seconds blocked; since:
        seconds since the previous save began."""
        if waited < max(_WAIT_S, _WAIT_SHARE * since) or self._is_warned or not self._ranks.leads:
            return
        self._is_warned = True
        print(
            f"ltx-train: training waited {waited:.0f} s for the previous save, which took longer than the "
            f"{since:.0f} s between two saves: raise checkpoint.interval ({self._save_every}) or use a faster disk",
            file=sys.stderr,
        )

    def _wait(self, *, must: bool) -> None:
        """Waits for the save in flight, on every rank. Reports a failure and continues, unless `must` is set or too
        many saves in a row have failed."""
        try:
            if not self._ranks.leads:
                self._saver.wait()  # for this rank's slice; the leading rank reports its failure
            self._ranks.lead(self._saver.wait)
        except (DataError, AgreedError) as error:
            self.failed += 1
            if must or self.failed >= self._failures:
                raise
            if str(error):
                print(f"ltx-train: {error}; training goes on ({self.failed} in a row)", file=sys.stderr)
            return
        self.failed = 0

    def close(self) -> None:
        """Lets the save in flight finish."""
        self._saver.close()
