"""Keeps `fit` running on a machine that the cloud may reclaim at any moment.

Starts the run, polls the cloud for notices and forwards them, mirrors every committed checkpoint to an object store,
restarts crashed runs as long as they make progress, and continues on another machine from the store.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ltx_train import signals
from ltx_train.assembly import from_config
from ltx_train.config import Config
from ltx_train.contracts import Exit, StoreError
from ltx_train.jobs import notices, processes
from ltx_train.jobs.uploads import Uploads
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.mirror import RunStore

# Exit codes after which a restart cannot help.
_FINAL = (Exit.DONE, Exit.CONFIG, Exit.DATA, Exit.DIVERGED)
_LONGEST_WAIT_S = 300.0
# What a shell adds to a signal's number.
_SIGNALLED = 128
# Tries to reach the store at the start, each after a longer pause.
_STORE_TRIES = 4


@dataclass
class _State:
    """State that signal handlers and notices change."""

    stopping: bool = False
    interrupts: int = 0
    child: Any = None


def supervise(config: Config) -> int:
    """Returns the run's exit code: 75 when the cloud reclaims this machine; then run the same command on another. 74
    when the run has ended and the store lacks it.

    StoreError when the store cannot be read and there is no local checkpoint: its run must not be started over.
    """
    folder = from_config.run_dir(config)
    store = RunStore(config.supervise.store, folder) if config.supervise.store else None
    uploads = Uploads(store, config.checkpoint.keep, config.supervise.backoff_s) if store is not None else None
    state = _State()
    previous = {number: signal.signal(number, _stopping(state)) for number in signals.handled()}
    try:
        _fetch(config, folder, store, state)
        code = Exit.PREEMPTED if state.stopping else _restarting(config, folder, uploads, state)
        return code if uploads is None or uploads.finish(in_haste=state.stopping) else code or Exit.STORE
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fetch(config: Config, folder: Path, store: RunStore | None, state: _State) -> None:
    for attempt in range(_STORE_TRIES if store is not None else 0):
        assert store is not None
        try:
            fetched = store.pull()
        except StoreError as error:
            if _newest(folder) >= 0:
                print(f"ltx-train: {error}; going on from the local checkpoints", file=sys.stderr)
                return
            if attempt == _STORE_TRIES - 1 or state.stopping:
                raise
            _sleep(config.supervise.backoff_s * 2**attempt, state)
            continue
        if fetched:
            print(f"fetched {fetched} from {config.supervise.store}", file=sys.stderr)
        return


def _restarting(config: Config, folder: Path, uploads: Uploads | None, state: _State) -> int:
    restarts = idle = 0
    while True:
        before = _newest(folder)
        code = _run_once(config, folder, uploads, state, restarts)
        if state.stopping and code > _SIGNALLED:
            return Exit.PREEMPTED  # the signal came before the run had set up its handlers
        if code in _FINAL or state.stopping:
            return code
        idle = 0 if _newest(folder) > before else idle + 1
        restarts += 1
        if idle >= config.supervise.restarts:
            print(f"ltx-train: {idle} starts in a row saved nothing new (last exit code {code})", file=sys.stderr)
            return code
        wait = min(_LONGEST_WAIT_S, config.supervise.backoff_s * 2**idle)
        print(f"ltx-train: fit ended with {code}; again in {wait:.0f} s from step {_newest(folder)}", file=sys.stderr)
        _sleep(wait, state)
        if state.stopping:
            return Exit.PREEMPTED


def _run_once(config: Config, folder: Path, uploads: Uploads | None, state: _State, restarts: int) -> int:
    """Starts `fit` once and returns its exit code. Uploads its checkpoints while it runs."""
    if state.stopping:
        return Exit.PREEMPTED
    poll = notices.source(config.supervise.notice, config.supervise.notice_url)
    child = processes.spawn(partial(processes.run_command, "fit"), config, {"LTX_TRAIN_RESTARTS": str(restarts)})
    state.child = child
    if state.stopping:
        os.kill(child.pid, signal.SIGTERM)  # the signal came between the check and the start
    next_poll = 0.0
    while child.is_alive():
        if not state.stopping and time.monotonic() >= next_poll:
            next_poll = time.monotonic() + config.supervise.poll_s
            if poll():
                print("ltx-train: this machine is being taken away: saving", file=sys.stderr)
                state.stopping = True
                os.kill(child.pid, signal.SIGUSR1)
        if uploads is not None:
            uploads.offer(_newest(folder))
        child.join(0.2)
    return processes.shell_code(child.exitcode)


def _stopping(state: _State) -> Any:
    def forward(number: int, _frame: FrameType | None) -> None:
        state.stopping = True
        if number == signal.SIGINT:
            state.interrupts += 1
        if state.child is not None and state.child.is_alive():
            os.kill(state.child.pid, number)
        elif state.interrupts > 1:
            # A transfer is left, maybe with a store that does not answer. Ctrl-C alone gives it up: SIGTERM after a
            # notice means that there are seconds left for it.
            raise signals.StopSignal

    return forward


def _newest(folder: Path) -> int:
    checkpoints = commit.committed(folder / "checkpoints")
    return commit.step_of(checkpoints[-1]) if checkpoints else -1


def _sleep(seconds: float, state: _State) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not state.stopping:
        time.sleep(min(0.2, seconds))
