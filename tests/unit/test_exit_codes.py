"""A failed GPU has a code of its own, and leaves its node's name for the job script."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltx_train.contracts import Exit
from ltx_train.jobs.exit_codes import exit_code_of, is_device_fault


class AcceleratorError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (AcceleratorError("anything"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("NCCL error: ncclUnhandledCudaError: Call to CUDA function failed."), True),
        (RuntimeError("NCCL error: ncclRemoteError: remote process exited or there was a network error"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_what_counts_as_a_failed_gpu(error: RuntimeError, is_fault: bool) -> None:
    assert is_device_fault(error) is is_fault


def test_a_failed_gpu_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LTX_TRAIN_LOST_DEVICES", str(tmp_path / "lost"))
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")

    def work() -> int:
        raise AcceleratorError("CUDA error: an illegal instruction was encountered")

    assert exit_code_of(work) == Exit.DEVICE == 71
    assert (tmp_path / "lost").read_text() == "2 gpu7\n"
    assert "a GPU of gpu7 failed" in capsys.readouterr().err
