"""Exit codes of commands, and one message on stderr for an error that the user can fix."""

from __future__ import annotations

import errno
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

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
# What CUDA and NCCL report of this process's own device.
_DEVICE_FAULTS = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "ncclUnhandledCudaError", "uncorrectable ECC")


def exit_code_of(work: Callable[[], int]) -> int:
    """Runs `work` and returns its exit code. A UserError, a full disk and Ctrl-C end without a traceback."""
    try:
        return _work_until_signal(work)
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
        if is_device_fault(error):
            return _device_fault()
        if type(error).__name__ in _LOST_RANK or "gloo" in str(error):
            _report("lost the connection to another rank")
            return _FAILED
        raise
    except KeyboardInterrupt:
        signals.ignore()
        _report("stopped")
        return Exit.PREEMPTED


def _work_until_signal(work: Callable[[], int]) -> int:
    """An error behind a signal is the signal's: libraries catch a KeyboardInterrupt and raise others."""
    try:
        return work()
    except Exception as error:
        if signals.arrived():
            raise KeyboardInterrupt from error
        raise


def is_device_fault(error: RuntimeError) -> bool:
    """Whether this process's own GPU has failed. The loss of another rank's is a lost connection here."""
    text = str(error)
    return type(error).__name__ == "AcceleratorError" or any(words in text for words in _DEVICE_FAULTS)


def _device_fault() -> int:
    """The traceback stays: a failed kernel may be a defect of a program. A job script goes on without the node, whose
    name it finds in the file LTX_TRAIN_LOST_DEVICES."""
    traceback.print_exc()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    _report(f"a GPU of {node} failed (dmesg shows Xid and ECC errors): the same command continues on another machine")
    lost = os.environ.get("LTX_TRAIN_LOST_DEVICES")
    if lost:
        with suppress(OSError), open(lost, "a", encoding="utf-8") as file:
            file.write(f"{os.environ.get('SLURM_RESTART_COUNT', '0')} {node}\n")
    return Exit.DEVICE


def _report(text: str) -> None:
    """Prints an error; an empty text was printed by another rank already (`distributed.ranks.AgreedError`)."""
    rank = os.environ.get("RANK", "0")
    if text:
        print(f"ltx-train{'' if rank == '0' else f' rank {rank}'}: {text}", file=sys.stderr)
