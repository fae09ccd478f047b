"""Turns signals into a flag that the loop reads after every optimizer step.

Owns the handlers of the signals in `signals.STOP` from the start of training to the end of the process.
A handler saves nothing itself, because it may interrupt any code.
"""

from __future__ import annotations

import signal
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer

from ltx_train import signals


class Preemption(Callback):
    """The first signal sets `requested`. A second Ctrl-C sets `forced` and stops without a save, unless the run is
    saved already.

    The handlers are installed before the trainer starts and again when training starts, because Lightning replaces
    them in between. When Lightning ends, it restores the handlers that it replaced.
    """

    def __init__(self) -> None:
        # A signal that came while the run started and that a library dropped stops it behind its first step.
        self.requested = signals.arrived()
        self.forced = self._is_saved = False

    def install(self) -> None:
        for number in signals.handled():
            signal.signal(number, self._handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.install()
        # A SIGTERM that came in between has set `requested`, and this flag, for which Lightning would end the process
        # behind the first batch: without a save, and with exit code 0.
        trainer._signal_connector.received_sigterm = False

    def saved(self) -> None:
        """Call after the last save. The run ends with exit code 75, which further signals must not change."""
        self._is_saved = True

    def leave(self) -> None:
        """Call when the trainer has ended."""
        if self._is_saved:
            signals.ignore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and not self._is_saved:
            self.forced = True
            raise signals.StopSignal
        self.requested = True
