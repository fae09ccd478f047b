"""Exit codes of commands, and one message on stderr for an error that the user can fix."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from ltx_train import signals
from ltx_train.contracts import Exit, UserError

# Errors of disks, paths and limits of the system get one message without a traceback; committed checkpoints stay.
_STORAGE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EPERM,
    errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENODEV,
    errno.ENXIO, errno.ETIMEDOUT,
)  # fmt: skip
# torch.distributed's errors when another process is gone.
_LOST_RANK = ("DistBackendError", "DistNetworkError", "DistStoreError")
_FAILED = 1


def exit_code_of(work: Callable[[], int]) -> int:
    """Runs `work` and returns its exit code. A UserError, a full disk and Ctrl-C end without a traceback."""
    try:
        return work()
    except UserError as error:
        _report(str(error))
        return int(error.exit_code)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _report(f"{error}: fix that, then the same command continues")
        return Exit.DATA
    except RuntimeError as error:
        # By name: most commands end before torch is imported. `fit` and `bench` add a plan.
        if type(error).__name__ == "OutOfMemoryError":
            _report(
                "the GPU ran out of memory: close other programs on it, or set a smaller memory.budget_gib or bucket"
            )
            return Exit.CONFIG
        if type(error).__name__ in _LOST_RANK or "gloo" in str(error):
            _report("lost the connection to another rank")
            return _FAILED
        raise
    except KeyboardInterrupt:
        signals.ignore()
        _report("stopped")
        return Exit.PREEMPTED


def _report(text: str) -> None:
    """Prints an error; an empty text was printed by another rank already (`distributed.ranks.AgreedError`)."""
    rank = os.environ.get("RANK", "0")
    if text:
        print(f"ltx-train{'' if rank == '0' else f' rank {rank}'}: {text}", file=sys.stderr)
