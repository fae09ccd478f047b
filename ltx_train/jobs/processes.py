"""Runs one process per device of this machine: starts, signals and ends them together.

Owns their common exit code: that of the first failed process, otherwise 0. On several machines srun or torchrun starts
the processes instead. torchrun would turn every failure into exit code 1, but a supervisor needs 75 and 76.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from ltx_train import signals
from ltx_train.assembly import resolve
from ltx_train.config import Config
from ltx_train.config.command_table import COMMANDS
from ltx_train.contracts import ConfigError, Exit
from ltx_train.distributed import allocator, environment
from ltx_train.jobs.exit_codes import exit_code_of

Entry = Callable[[Config], int]

# Seconds that the other processes may take to end by themselves once one has failed, and then after SIGTERM.
_GRACE_S, _KILL_S = 10.0, 5.0
# prctl's PR_SET_PDEATHSIG.
_DEATH_SIGNAL = 1
# What a shell adds to a signal's number.
_SIGNALLED = 128


def run_command(name: str, config: Config) -> int:
    """Runs a command, in one process per device if the command supports several devices.

    Only a process that runs the command imports it: this one would spend seconds on libraries that it does not use.
    """
    allocator.use_expandable_segments(os.environ)
    is_started_already = environment.rank_variables(os.environ) is not None
    count = resolve.launch(config).processes
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if is_started_already and here is not None and int(here) != count:
        raise ConfigError(
            f"{here} processes were started on this machine, but strategy.devices={count}: set strategy.devices={here}"
        )
    if COMMANDS[name].on_every_device and count > 1 and not is_started_already:
        return run_processes(partial(_run_here, name), config, count)
    return _run_here(name, config)


def _run_here(name: str, config: Config) -> int:
    _silence_libraries()
    _refuse_unusable_cache()
    entry: Entry = importlib.import_module(f"ltx_train.commands.{name}").run
    return entry(config)


def _refuse_unusable_cache() -> None:
    """ConfigError when the folder for compiled kernels cannot be made: torch would fail in its own words, also in
    runs that compile nothing."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"TORCHINDUCTOR_CACHE_DIR={folder} cannot be used ({error}): unset it") from error


def _silence_libraries() -> None:
    """Silences bitsandbytes, which advertises optional kernels when it is imported."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run_processes(entry: Entry, config: Config, count: int) -> int:
    """Runs `entry` in `count` processes. Returns the exit code of the first that failed, otherwise 0."""
    context = get_context("spawn")
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # Each process uses its share of the CPU cores; otherwise each would start a thread and a compiler for every core.
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        shared[name] = os.environ.get(name, str(min(32, max(1, (os.cpu_count() or 1) // count))))
    children: list[Any] = [context.Process(target=_child, args=(entry, config, os.getpid())) for _ in range(count)]
    received: set[int] = set()
    previous = {number: signal.signal(number, _forwarding(children, received)) for number in signals.handled()}
    try:
        for rank, child in enumerate(children):
            # Set before the child starts: libraries read the number of threads and the rank when they are imported.
            with _environment({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}), _signals_wait():
                child.start()
        code = _wait_for_all(children, received)
        # A process that had not come to its own handlers yet ended by the signal itself.
        return Exit.PREEMPTED if code - _SIGNALLED in received else code
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def spawn(entry: Entry, config: Config, variables: Mapping[str, str]) -> Any:
    """Starts a process that runs `entry` in its own process group. It dies with this process."""
    child = get_context("spawn").Process(target=_child, args=(entry, config, os.getpid()))
    with _environment(variables), _signals_wait():
        child.start()
    return child


@contextmanager
def _signals_wait() -> Generator[None]:
    """Holds signals back while a process starts.

    Between fork and exec the child has this process's handlers. A signal that meets them there is noted in memory which
    the exec throws away: the run would never learn of it. A signal that waits survives the exec, and the child takes it
    once its own handlers are there.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _child(entry: Entry, config: Config, parent: int) -> None:
    # All of it inside: a signal between the handlers and the entry would come out as multiprocessing's exit code 1.
    sys.exit(exit_code_of(lambda: _in_child(entry, config, parent)))


def _in_child(entry: Entry, config: Config, parent: int) -> int:
    signals.stop_like_ctrl_c()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)
    # The parent forwards signals: in the parent's group, Ctrl-C on a terminal would reach every process twice.
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL))
    return entry(config) if os.getppid() == parent else Exit.DONE


def _forwarding(children: list[Any], received: set[int]) -> Any:
    def forward(number: int, _frame: FrameType | None) -> None:
        received.add(number)
        for child in children:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, number)

    return forward


def _wait_for_all(children: list[BaseProcess], received: set[int]) -> int:
    """Waits for all processes. Once one has failed, the others have some seconds to end before they are signalled."""
    failed_at, code = 0.0, 0
    while any(child.is_alive() for child in children):
        if not failed_at:
            code = _first_failure(children, received)
            failed_at = time.monotonic() if code else 0.0
        waited = time.monotonic() - failed_at if failed_at else 0.0
        if waited > _GRACE_S:
            _signal(children, signal.SIGKILL if waited > _GRACE_S + _KILL_S else signal.SIGTERM)
        time.sleep(0.05)
    return code or _first_failure(children, received)  # all may have ended between two looks


def _first_failure(children: list[BaseProcess], received: set[int]) -> int:
    """The exit code of the process that failed for the others, 0 without one; a killed one is named.

    A killed process is the cause, and others that lost the connection to it are not: negative codes first.
    """
    ended = {rank: child.exitcode for rank, child in enumerate(children) if child.exitcode}
    if not ended:
        return 0
    rank = min(ended, key=lambda r: ended[r])
    if ended[rank] < 0 and -ended[rank] not in received:
        _report_killed(rank, -ended[rank])
    return shell_code(ended[rank])


def _report_killed(rank: int, number: int) -> None:
    hint = ": the system kills processes when memory is full (dmesg)" if number == signal.SIGKILL else ""
    print(f"ltx-train: rank {rank} was killed by {signal.Signals(number).name}{hint}", file=sys.stderr)


def _signal(children: list[BaseProcess], number: signal.Signals) -> None:
    for child in children:
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, number)


def shell_code(code: int) -> int:
    """The exit code that a shell reports: 128 + number for a process that a signal has ended."""
    return code if code >= 0 else _SIGNALLED - code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
