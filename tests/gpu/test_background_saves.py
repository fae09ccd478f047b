"""A GPU's state on its way into a checkpoint: memory that is kept from save to save."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ltx_train.training.checkpoints.background import Snapshot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_state_is_copied_into_memory_that_was_made_ready() -> None:
    """Memory is made ready in another thread while this one computes; what is changed afterwards is not in the copy."""
    size = 2**22
    tensors = {f"block{n}": {"master": torch.zeros(size, device="cuda")} for n in range(8)}
    snapshot = Snapshot()
    with ThreadPoolExecutor(1) as thread:
        ready = thread.submit(snapshot.prepare, tensors, ("slice",))
        while not ready.done():
            torch.ones(1024, 1024, device="cuda") @ torch.ones(1024, 1024, device="cuda")
        ready.result()
    places: list[int] = []
    for value in (1.0, 2.0):
        for kinds in tensors.values():
            kinds["master"].fill_(value)
        taken = snapshot.of(tensors, ("slice",))
        for kinds in tensors.values():
            kinds["master"].fill_(-1)
        copies = [kinds["master"] for kinds in taken.values()]
        assert all(bool(copy.eq(value).all()) for copy in copies)
        places.append(copies[0].data_ptr())
    assert places[0] == places[1]
