"""Page-locked memory stays out of the processes that a run forks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ltx_train.memory.pinned import outside_forks, pinned


def _is_copied_by_forks(address: int) -> bool:
    """From the kernel's flags of the mapping: `dc` is "do not copy area on fork"."""
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert flags
    return " dc" not in flags


def test_a_fork_gets_no_copy() -> None:
    memory = outside_forks(3 * 2**20 + 7)
    assert memory.shape == (3 * 2**20 + 7,)
    memory.fill_(5)
    assert not _is_copied_by_forks(memory.data_ptr())
    assert _is_copied_by_forks(torch.ones(2**22).data_ptr())
    child = os.fork()
    if child == 0:
        os._exit(7 if Path("/proc/self/statm").read_text() else 1)  # it lives without them
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert int(memory.sum()) == 5 * memory.numel()


def test_memory_for_the_cpu_is_plain() -> None:
    assert pinned(16, torch.device("cpu")).shape == (16,)
    assert pinned(0, torch.device("cuda")).shape == (0,)
