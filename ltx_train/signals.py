"""The signals that ask a run to stop, and what they do before there is anything to save. Imports no library.

SIGINT is Ctrl-C, SIGTERM comes from schedulers and systemd, SIGUSR1 from SLURM before a time limit, SIGHUP from a
terminal that was closed.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopSignal(KeyboardInterrupt):
    """What handlers raise, never KeyboardInterrupt itself.

    CPython remembers an exception of exactly that type that has left an `exec` of text, with which imports make
    dataclasses and named tuples. A program of `python -m` then ends itself by SIGINT (130 in a shell), although it has
    handled the exception.
    """


def handled() -> tuple[signal.Signals, ...]:
    """STOP without SIGHUP where it is ignored: `nohup` starts programs so."""
    return tuple(n for n in STOP if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN)


def ignore() -> None:
    """Ignores them from here on: the interpreter removes Python handlers while it exits, and a late signal would then
    end the process with the wrong exit code."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


# Of the handlers below: a signal came, whatever became of its KeyboardInterrupt.
_arrived = False


def stop_like_ctrl_c() -> None:
    """Makes each of them end the process like Ctrl-C, with exit code 75. Called first of all, before imports that take
    seconds; training replaces the handlers by its own."""
    global _arrived  # noqa: PLW0603
    _arrived = False
    for number in handled():
        signal.signal(number, _interrupt)


def arrived() -> bool:
    """Whether a signal has come under these handlers. A library may turn the KeyboardInterrupt inside its C code into
    an error of its own ("could not determine the shape of object type ..."), or drop it."""
    return _arrived


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    global _arrived  # noqa: PLW0603
    _arrived = True
    raise StopSignal
