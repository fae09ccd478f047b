"""How a command ends: its exit code, and one line on stderr for what a user can mend."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from ltx_train.contracts import Exit, UserError

# A full or read-only disk is no fault of the program: one line, and what was committed stays.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; a user's mistake, a full disk and Ctrl-C end without a traceback."""
    try:
        return work()
    except UserError as error:
        _say(str(error))
        return int(error.exit_code)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _say(f"{error}: mend that, then the same command continues")
        return Exit.DATA
    except KeyboardInterrupt:
        _say("stopped")
        return Exit.PREEMPTED


def _say(text: str) -> None:
    """An empty text was said by another rank."""
    rank = os.environ.get("RANK", "0")
    if text:
        print(f"ltx-train{'' if rank == '0' else f' rank {rank}'}: {text}", file=sys.stderr)
