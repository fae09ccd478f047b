"""The distributions of noise levels, their quantiles and weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ltx_train.diffusion import sigma
from ltx_train.diffusion.loss import level_weight
from ltx_train.diffusion.sigma import SigmaDistribution, SigmaKind

COUNT = 40_000


def drawn(params: SigmaDistribution, tokens: int = 1024) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    normal = torch.randn(COUNT, generator=stream)
    uniform, selector = torch.rand(2, COUNT, generator=stream)
    return sigma.levels(normal, uniform, selector, tokens, params)


def test_the_high_mixture_is_sixty_percent_from_the_upper_third() -> None:
    """With probability 0.6 U[0.7, 1], else U[0, 1]: 0.6 + 0.4 * 0.3 of all draws lie above 0.7."""
    found = drawn(SigmaDistribution(kind=SigmaKind.high))
    assert float((found >= 0.7).float().mean()) == pytest.approx(0.72, abs=0.01)
    assert float(found.mean()) == pytest.approx(0.6 * 0.85 + 0.4 * 0.5, abs=0.01)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_uniform_and_logit_normal() -> None:
    flat = drawn(SigmaDistribution(kind=SigmaKind.uniform, low=0.2, high=0.6))
    assert float(flat.min()) == pytest.approx(0.2, abs=0.001)
    assert float(flat.max()) == pytest.approx(0.6, abs=0.001)
    assert float(flat.mean()) == pytest.approx(0.4, abs=0.005)
    bell = drawn(SigmaDistribution(kind=SigmaKind.logit_normal, mean=1.0, std=0.5))
    assert float(bell.median()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)


def test_the_shift_can_be_fixed_and_limited() -> None:
    free, fixed = SigmaDistribution(), SigmaDistribution(tokens=4096)
    assert torch.equal(drawn(fixed, 125), drawn(free, 4096))
    limited = SigmaDistribution(shift_limits=(0.95, 2.05))
    assert torch.equal(drawn(limited, 125), drawn(free, 1024))
    assert torch.equal(drawn(limited, 14080), drawn(free, 4096))
    assert not torch.equal(drawn(free, 125), drawn(free, 1024))


@pytest.mark.parametrize("kind", list(SigmaKind))
def test_quantiles_cut_the_training_distribution_into_equal_parts(kind: SigmaKind) -> None:
    params = replace(SigmaDistribution(), kind=kind)
    levels = sigma.quantiles(params, {1024: 1.0}, 9)
    assert levels == sorted(levels)
    assert levels == sigma.quantiles(params, {1024: 1.0}, 9)
    found = drawn(params)
    for number, level in enumerate(levels):
        assert float((found <= level).float().mean()) == pytest.approx((number + 0.5) / 9, abs=0.012)


def test_cosmap_by_hand() -> None:
    weights = level_weight("cosmap", torch.tensor([0.0, 0.5]))
    assert isinstance(weights, torch.Tensor)
    assert weights.tolist() == pytest.approx([2 / math.pi, 4 / math.pi])
    assert level_weight("none", torch.tensor([0.3])) == 1.0
    # Its density integrates to one: the weighting leaves the scale of the loss alone.
    grid = torch.linspace(0, 1, 10001)
    assert float(torch.trapezoid(level_weight("cosmap", grid), grid)) == pytest.approx(1, abs=1e-4)  # type: ignore[arg-type]
