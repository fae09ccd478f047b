"""The saves of a run: a snapshot of the complete state, a failure count over ranks, and a warning about slow disks.

Owns the steps around a background save. `background` writes the snapshot, `commit` makes it a valid checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ltx_train.contracts import DataError, UserError
from ltx_train.distributed.ranks import AgreedError, Ranks
from ltx_train.training.checkpoints.background import Publish, Saver
from ltx_train.training.checkpoints.commit import Checkpoint
from ltx_train.training.state import RunState

# How long training may wait for the previous save before the user is advised to save less often: seconds, and the share
# of the time between two saves.
_WAIT_S, _WAIT_SHARE = 1.0, 0.05
# Seconds between two tries of a save that fails.
_PAUSE_S = 10.0


class CheckpointWriter:
    """folder: holds all checkpoints. waits: whether training waits when two saves in a row fail, instead of ending;
    either way no more than the steps since the last good save and one interval can be lost. save_every: the configured
    interval in steps, for the warning. settings: text of the run's configuration."""

    def __init__(
        self, folder: Path, *, keep: int, waits: bool, save_every: int, settings: str, publish: Publish, ranks: Ranks
    ) -> None:
        self._saver = Saver(folder, keep, publish, leads=ranks.leads)
        self._waits, self._save_every, self._settings, self._ranks = waits, save_every, settings, ranks
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

    def save(self, state: RunState, *, must: bool, may_wait: Callable[[], bool]) -> None:
        """Starts to save the current step. Collective.

        must: waits for the save. may_wait: called before each repetition of a failed save, on every rank and with the
        same result; False once the run has to end. DataError when the save must succeed and does not.
        """
        step = state.step
        if step.step == self._saved:
            return
        step.guard.check()
        began = time.perf_counter()
        self._finish_previous()
        if self._save_every <= step.step - self._saved:
            self._warn(waited=time.perf_counter() - began, since=began - self._began)
        self._began = began
        self._start(state)
        self._saved = step.step
        if must or self.failed:
            self._insist(state, may_wait)
        self.blocked_s = time.perf_counter() - began

    def _start(self, state: RunState) -> None:
        live = self._live(state)
        if self._ranks.leads or live.slice is not None:
            self._saver.start(live, state.early_stop.best_step)

    def _finish_previous(self) -> None:
        """Reports a failure of the save before. Training has gone on meanwhile."""
        error = self._outcome()
        if error is not None and str(error):
            print(f"ltx-train: {error}; training goes on, and the next save has to succeed", file=sys.stderr)

    def _insist(self, state: RunState, may_wait: Callable[[], bool]) -> None:
        """Repeats a save until it succeeds. Training stands still, so every repetition saves the same state."""
        is_reported = False
        while (error := self._outcome()) is not None:
            if not self._waits or not may_wait():
                raise error
            if not is_reported and str(error):
                is_reported = True
                print(
                    f"ltx-train: {error}; training waits and tries again every {_PAUSE_S:.0f} s "
                    "(checkpoint.on_full=stop ends the run instead)", file=sys.stderr,
                )  # fmt: skip
            time.sleep(_PAUSE_S)
            self._start(state)

    def _outcome(self) -> UserError | None:
        """Waits for the save in flight on every rank. Returns its error, on all ranks or on none."""
        try:
            if not self._ranks.leads:
                self._saver.wait()  # for this rank's slice; the leading rank reports its failure
            self._ranks.lead(self._saver.wait)
        except (DataError, AgreedError) as error:
            self.failed += 1
            return error
        self.failed = 0
        return None

    def _live(self, state: RunState) -> Checkpoint:
        """The current state, with its tensors on the device."""
        recipe = state.step.recipe
        trained = recipe.updates.state()
        live = Checkpoint(
            step=state.step.step, weights=trained.weights, optimizer=trained.optimizer,
            notes=state.notes(self._ranks), average={} if recipe.average is None else recipe.average.tensors,
            slice=trained.slice, settings=self._settings,
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

    def close(self) -> None:
        """Lets the save in flight finish."""
        self._saver.close()
