"""The signals that ask a run to stop, and what they do before there is anything to save. Imports no library.

SIGINT is Ctrl-C, SIGTERM comes from schedulers and systemd, SIGUSR1 from SLURM before a time limit, SIGHUP from a
terminal that was closed.
"""

from __future__ import annotations

import signal

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def handled() -> tuple[signal.Signals, ...]:
    """STOP without SIGHUP where it is ignored: `nohup` starts programs so."""
    return tuple(n for n in STOP if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN)


def ignore() -> None:
    """Ignores them from here on: the interpreter removes Python handlers while it exits, and a late signal would then
    end the process with the wrong exit code."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def stop_like_ctrl_c() -> None:
    """Makes each of them end the process like Ctrl-C, with exit code 75. Called first of all, before imports that take
    seconds; training replaces the handlers by its own."""
    for number in handled():
        signal.signal(number, signal.default_int_handler)
