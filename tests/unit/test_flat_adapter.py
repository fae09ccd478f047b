"""An adapter in flat tensors: gradients of the passes are handed over whole, and weights stay views."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ltx_train.updates import flat_adapter
from ltx_train.updates.flat_adapter import FlatAdapter


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setattr(flat_adapter, "_PIECE", 16)  # the second weight, of 20, is larger
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5), nn.Linear(5, 2))


def test_gradients_of_all_passes_are_handed_over_at_once(layers: nn.Sequential) -> None:
    parameters = dict(layers.named_parameters())
    flat = FlatAdapter(parameters)
    flat.bind()
    assert [len(places) for places in flat.contents().values()] == [1, 1, 2, 1]
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for seed in range(2):
        loss = layers(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))).square().sum()
        of_pass = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, of_pass, strict=True):
            expected[name] += gradient
        loss.backward()
    flat().backward()
    for whole, places in zip(flat.flat, flat.contents().values(), strict=True):
        assert whole.grad is not None
        for place in places:
            assert torch.equal(whole.grad[place.start : place.stop].view(place.shape), expected[place.name])
    flat.zero_gradients()
    assert all(not bool(p.grad.any()) for p in parameters.values() if p.grad is not None)


def test_an_update_of_the_flat_weights_is_seen_by_the_layers(layers: nn.Sequential) -> None:
    """Also where an engine has moved them to other memory."""
    values = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
    flat = FlatAdapter(dict(layers.named_parameters()))
    for whole in flat.flat:
        whole.data = whole.data.clone()
    flat.bind()
    for whole in flat.flat:
        whole.data.mul_(2)
    assert all(torch.equal(parameter, 2 * values[name]) for name, parameter in layers.named_parameters())
