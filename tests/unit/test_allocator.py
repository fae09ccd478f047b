from __future__ import annotations

import pytest
import torch

from ltx_train.config import Config
from ltx_train.distributed import allocator
from ltx_train.jobs import processes

NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
MORE = "max_split_size_mb:64,"
GROWING, FIXED = "expandable_segments:True", "expandable_segments:False"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {OLD: GROWING}),
        ({OLD: ""}, {OLD: GROWING}),
        ({OLD: FIXED}, {OLD: FIXED}),
        ({NEW: "max_split_size_mb:64"}, {NEW: "max_split_size_mb:64"}),
    ],
)
def test_segments_grow_unless_a_variable_is_set(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    allocator.use_expandable_segments(environment)
    assert environment == expected


def test_run_command_sets_the_variable_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(processes.os, "environ", environment)
    seen: list[str] = []

    def command(_name: str, _config: Config) -> int:
        seen.append(environment[OLD])
        return 0

    monkeypatch.setattr(processes, "_run_here", command)
    assert processes.run_command("plan", Config()) == 0
    assert seen == [GROWING]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (OLD, GROWING, [FIXED, "made", GROWING]),
        (NEW, f"{MORE}{GROWING}", [f"{MORE}{FIXED}", "made", f"{MORE}{GROWING}"]),
        (OLD, FIXED, ["made"]),
        (OLD, "", ["made"]),
    ],
)  # fmt: skip
def test_memory_to_be_mapped_is_made_while_segments_do_not_grow(
    name: str, settings: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for variable in (NEW, OLD):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    with allocator.mappable():
        said.append("made")
    assert said == expected
    with pytest.raises(MemoryError), allocator.mappable():
        raise MemoryError
    assert said[len(expected) :] == [setting for setting in expected if setting != "made"]
