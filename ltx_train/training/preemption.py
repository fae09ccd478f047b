"""Turns signals into a flag that the loop reads after every optimizer step.

Owns the handlers of SIGINT, SIGTERM and SIGUSR1 from the start of training to the end of the process.
A handler saves nothing itself, because it may interrupt any code.
"""

from __future__ import annotations

import signal
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def stop_before_training() -> None:
    """Makes every signal end the process like Ctrl-C until `Preemption.install`: there is nothing to save yet."""
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)


class Preemption(Callback):
    """The first signal sets `requested`. A second Ctrl-C stops at once, unless the run is saved already.

    The handlers are installed before the trainer starts and again when training starts, because Lightning replaces
    them in between. When Lightning ends, it restores the handlers that it replaced.
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
        """Call after the last save. The run ends with exit code 75, which further signals must not change."""
        self._is_saved = True

    def leave(self) -> None:
        """Call when the trainer has ended. A saved run ignores signals from here on: the interpreter removes Python
        handlers while it exits, and a late signal would then end the process with the wrong exit code."""
        for number in _SIGNALS if self._is_saved else ():
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and not self._is_saved:
            raise KeyboardInterrupt
        self.requested = True
