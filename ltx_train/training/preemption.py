"""Signals to a flag that the loop reads at the edge of a step.

Owns the handlers of SIGINT, SIGTERM and SIGUSR1 while training runs. Nothing is saved inside a
handler: a handler may interrupt anything.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """`requested` turns true on the first signal; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    # Lightning installs its own handlers after setup and on_fit_start; on_train_start is the first safe place.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def settled(self) -> None:
        """The run is saved and ends: a second notice must not end it otherwise."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
