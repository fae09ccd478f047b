"""Signals to a flag that the loop reads at the edge of a step.

Owns the handlers of SIGINT, SIGTERM and SIGUSR1 from the start of training to the end of the process.
Nothing is saved inside a handler: a handler may interrupt anything.
"""

from __future__ import annotations

import signal
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def stop_before_training() -> None:
    """Until `Preemption.install`: there is nothing to save yet, so a notice ends the process as Ctrl-C does."""
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)


class Preemption(Callback):
    """`requested` turns true on the first signal; a second Ctrl-C stops at once, unless the run is saved already.

    `install` before the trainer starts and again when training does: Lightning puts its own handlers over ours
    in between, and at its end puts back what it found.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_saved = False

    def install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.install()

    def saved(self) -> None:
        """The run is saved and ends with 75: further notices must not change the exit code."""
        self._is_saved = True

    def leave(self) -> None:
        """The trainer is gone. A Python handler would be taken away while the interpreter ends, and a late notice
        would then end the process with the wrong code; an ignored signal stays ignored."""
        for number in _SIGNALS if self._is_saved else ():
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and not self._is_saved:
            raise KeyboardInterrupt
        self.requested = True
