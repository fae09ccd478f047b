"""How a command ends: its exit code, and one message on stderr for a mistake that the user can mend."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from ltx_train.contracts import Exit, UserError

# A full or read-only disk is no fault of the program: one message, and committed checkpoints stay.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`. A user's mistake, a full disk and Ctrl-C end without a traceback."""
    try:
        return work()
    except UserError as error:
        _report(str(error))
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _report(f"{error}: mend that, then the same command continues")
        return Exit.DATA
    except KeyboardInterrupt:
        _report("stopped")
        return Exit.PREEMPTED


def _report(text: str) -> None:
    """Another rank has already printed an error whose text is empty here (`distributed.ranks.AgreedError`)."""
    rank = os.environ.get("RANK", "0")
    if text:
        print(f"ltx-train{'' if rank == '0' else f' rank {rank}'}: {text}", file=sys.stderr)
