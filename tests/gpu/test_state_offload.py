"""A full fine-tune's gradients and masters on their ways between the GPU and host memory."""

from __future__ import annotations

import gc

import pytest
import torch

from ltx_train.updates.state_offload import StateOffload, accumulate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_what_travels_passes_through_page_locked_memory() -> None:
    offload, total = StateOffload(None), torch.zeros(2**22)

    def add(_name: str, share: torch.Tensor) -> None:
        assert share.is_pinned()
        accumulate(total, share, 0.5)

    for value in (1.0, 2.0):
        share = torch.full((2**22,), value, device="cuda", dtype=torch.bfloat16)
        offload.add_gradient("transformer_blocks.0", share, add)
        gc.collect()
    offload.wait_for_gradients(add)
    assert total.eq(1.5).all()


def test_masters_become_the_devices_weights() -> None:
    """More of them than travel at once, so that memory on the way is used again."""
    offload, count = StateOffload(None), 5 * 2**23
    weights = torch.empty(count, device="cuda", dtype=torch.bfloat16)
    for step in range(3):
        master = torch.arange(count, dtype=torch.float32) + step
        offload.send(master, weights)
        assert torch.equal(weights.cpu(), master.to(torch.bfloat16))
    assert all(slot.values.is_pinned() for slot in offload._sending)
