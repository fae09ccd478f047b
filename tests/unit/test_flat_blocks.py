"""Blocks as flat parameters: values and gradients of separate ones."""

from __future__ import annotations

import torch
from torch import nn

from ltx_train.memory.weights.flat_blocks import FlatBlocks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 5)
        self.scale = nn.Parameter(torch.arange(5.0))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(self.down(hidden))


def used(flat: FlatBlocks, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    (attached,) = flat.attach(0, [hidden])
    flat.begin(0, backward=False, training=True)
    return layer(attached)


def test_values_and_gradients_are_those_of_separate_parameters() -> None:
    """Over two passes: gradients of the flat parameter add up, and nothing stays in the tensors."""
    torch.manual_seed(0)
    plain, layer = Layer(), Layer()
    layer.load_state_dict(plain.state_dict())
    # A module's own parameters come before its submodules'.
    order = list(layer.parameters())
    flat = FlatBlocks([layer])
    assert [name for name, _ in layer.named_parameters()] == ["flat"]
    hidden = torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        expected = plain(hidden)
        result = used(flat, layer, hidden)
        assert torch.equal(result, expected)
        (first,) = torch.autograd.grad(expected.square().mean(), hidden, retain_graph=True)
        expected.square().mean().backward()
        hidden.grad = None
        result.square().mean().backward()
        assert hidden.grad is not None
        torch.testing.assert_close(hidden.grad, first)
        flat.end(0)
    ((whole, places),) = flat.contents().items()
    assert [place.parameter for place in places] == order
    assert all(place.parameter.grad is None and place.parameter.numel() == 0 for place in places)
    assert whole.grad is not None
    trained = [parameter.grad for parameter in plain.parameters()]
    torch.testing.assert_close(whole.grad, torch.cat([g.reshape(-1) for g in trained if g is not None]))


def test_a_tensor_without_gradient_counts_as_zero() -> None:
    """A mode may leave a part of the block out."""
    layer = Layer()
    flat = FlatBlocks([layer])
    (attached,) = flat.attach(0, [torch.randn(4, 3, requires_grad=True)])
    flat.begin(0, backward=False, training=True)
    layer.down(attached).sum().backward()
    ((whole, places),) = flat.contents().items()
    assert whole.grad is not None
    used = next(place for place in places if place.parameter is layer.down.weight)
    assert bool(whole.grad[used.start : used.stop].any())
    whole.grad[used.start : used.stop] = 0
    assert not bool(whole.grad.any())
