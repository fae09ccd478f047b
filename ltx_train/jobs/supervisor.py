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

from ltx_train.assembly import from_config
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.jobs import notices, processes
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.mirror import RunStore

# Exit codes after which a restart cannot help.
_FINAL = (Exit.DONE, Exit.CONFIG, Exit.DATA, Exit.DIVERGED)
_LONGEST_WAIT_S = 300.0
_NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class _State:
    """State that signal handlers and notices change."""

    stopping: bool = False
    child: Any = None


def supervise(config: Config) -> int:
    """Returns the run's exit code: 75 when the cloud reclaims this machine; then run the same command on another."""
    folder = from_config.run_dir(config)
    settings = config.supervise
    store = RunStore(settings.store, folder) if settings.store else None
    fetched = store.pull() if store else None
    if fetched:
        print(f"fetched {fetched} from {settings.store}", file=sys.stderr)
    state = _State()
    previous = {
        number: signal.signal(number, _stopping(state)) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        return _restarting(config, folder, store, state)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _restarting(config: Config, folder: Path, store: RunStore | None, state: _State) -> int:
    restarts = idle = 0
    while True:
        before = _newest(folder)
        code = _run_once(config, folder, store, state, restarts)
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


def _run_once(config: Config, folder: Path, store: RunStore | None, state: _State, restarts: int) -> int:
    """Starts `fit` once and returns its exit code. Mirrors its checkpoints while it runs and after its end."""
    poll = notices.source(config.supervise.notice, config.supervise.notice_url)
    child = processes.spawn(partial(processes.run_command, "fit"), config, {"LTX_TRAIN_RESTARTS": str(restarts)})
    state.child = child
    mirrored, next_poll = -1, 0.0
    while child.is_alive():
        if not state.stopping and time.monotonic() >= next_poll:
            next_poll = time.monotonic() + config.supervise.poll_s
            if poll():
                print("ltx-train: this machine is being taken away: saving", file=sys.stderr)
                state.stopping = True
                os.kill(child.pid, signal.SIGUSR1)
        newest = _newest(folder)
        if newest != mirrored:
            _mirror(config, store)
            mirrored = newest
        child.join(0.2)
    _mirror(config, store)
    return processes.shell_code(child.exitcode)


def _mirror(config: Config, store: RunStore | None) -> None:
    """Uploads to the store. An unreachable store is only reported: it must not end a run whose disk is fine."""
    if store is None:
        return
    try:
        store.push(config.checkpoint.keep)
    except OSError as error:
        print(f"ltx-train: {config.supervise.store} could not be written ({error}); retrying later", file=sys.stderr)


def _stopping(state: _State) -> Any:
    def forward(number: int, _frame: FrameType | None) -> None:
        state.stopping = True
        if state.child is not None and state.child.is_alive():
            os.kill(state.child.pid, number)

    return forward


def _newest(folder: Path) -> int:
    checkpoints = commit.committed(folder / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else -1


def _sleep(seconds: float, state: _State) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not state.stopping:
        time.sleep(min(0.2, seconds))
