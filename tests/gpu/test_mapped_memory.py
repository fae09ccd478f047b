"""Sums over several processes' memory on one GPU, launched and as a CUDA graph. Run: make gpu"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ltx_train.distributed.mapped_memory import PeerSums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
WORLD, SIZE = 3, 3 * 2**20


def gather_objects(value: Any) -> list[Any]:
    values: list[Any] = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def values(rank: int, number: int) -> torch.Tensor:
    stream = torch.Generator("cuda").manual_seed(100 * rank + number)
    return torch.randn(SIZE, generator=stream, device="cuda").bfloat16()


def expected(rank: int, number: int) -> torch.Tensor:
    return torch.stack([values(r, number).float() for r in range(WORLD)]).sum(0).chunk(WORLD)[rank]


def sums_on(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    slots = [torch.zeros(SIZE + 256 * WORLD, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    sums, refusal = PeerSums.over(slots, rank, WORLD, gather_objects)
    assert sums is not None, refusal
    assert sums.awaited() == ""
    shares = [torch.empty(SIZE // WORLD, device="cuda") for _ in range(2)]
    given = [torch.empty(SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

    def both() -> None:
        for slot in range(2):
            slots[slot][:SIZE].copy_(given[slot])
            sums(slot, SIZE, shares[slot])

    graph = torch.cuda.CUDAGraph()
    for number in range(12):
        for slot in range(2):
            given[slot].copy_(values(rank, 2 * number + slot))
        if number == 6:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                both()
        graph.replay() if number >= 6 else both()
        for slot in range(2):
            torch.testing.assert_close(shares[slot], expected(rank, 2 * number + slot), rtol=1e-5, atol=1e-5)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


def test_sums_of_several_processes_launched_and_recorded(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sums_on, (str(tmp_path / "meeting"),), nprocs=WORLD)
