"""Noise levels: the distribution of sigma in training and its schedule in sampling.

All values are float32 in [0, 1]. The formulas follow the LTX-2 reference. Training and sampling use the same shift,
a line through (1024 tokens, 0.95) and (4096 tokens, 2.05).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ltx_train import rng

_SLOPE = (2.05 - 0.95) / (4096 - 1024)
# Quantiles of the standard normal at 0.5 % (negated) and 99.9 %. Stretching maps them to sigma 0 and 1.
_LOW_QUANTILE, _HIGH_QUANTILE = 2.5758, 3.0902
_TERMINAL_SIGMA = 0.1
_QUANTILE_DRAWS = 1 << 18
INFERENCE_TOKENS = 4096
_REFINING_STEPS = 3


class SigmaKind(StrEnum):
    """shifted_logit_normal follows the LTX-2 reference; high is uniform with more weight on the highest levels."""

    shifted_logit_normal = "shifted_logit_normal"
    logit_normal = "logit_normal"
    uniform = "uniform"
    high = "high"


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaDistribution:
    """Parameters of the distribution of noise levels.

    Both logit-normals: std. logit_normal: mean. uniform: bounds low and high. high: the share high_prob is drawn from
    U[high_from, 1] instead of U[0, 1].
    shifted_logit_normal: eps, the smallest level; uniform_prob, the share drawn from U[eps, 1]; tokens, the token count
    that sets the shift (None: the sample's own); shift_limits, bounds of the shift (None: unlimited, as in the
    reference).
    """

    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    kind: SigmaKind = SigmaKind.shifted_logit_normal
    mean: float = 0.0
    tokens: int | None = None
    shift_limits: tuple[float, float] | None = None
    low: float = 0.0
    high: float = 1.0
    high_from: float = 0.7
    high_prob: float = 0.6


def shift(tokens: int) -> float:
    """mu of the shifted logit-normal for a token count; linear and unlimited, as in the reference."""
    return 0.95 + _SLOPE * (tokens - 1024)


def levels(normal: Tensor, uniform: Tensor, selector: Tensor, tokens: int, params: SigmaDistribution) -> Tensor:
    """sigma from three independent random tensors of the same shape: standard normal, U[0, 1) and U[0, 1).

    Returns float32 in [0, 1] of that shape.
    """
    match params.kind:
        case SigmaKind.shifted_logit_normal:
            return shifted_logit_normal(normal, uniform, selector, tokens, params)
        case SigmaKind.logit_normal:
            return torch.sigmoid(normal.float() * params.std + params.mean)
        case SigmaKind.uniform:
            return params.low + (params.high - params.low) * uniform.float()
        case SigmaKind.high:
            raised = params.high_from + (1 - params.high_from) * uniform.float()
            return torch.where(selector < params.high_prob, raised, uniform.float())


def shifted_logit_normal(
    normal: Tensor, uniform: Tensor, selector: Tensor, tokens: int, params: SigmaDistribution
) -> Tensor:
    """The reference's distribution, stretched so that its 0.5 % and 99.9 % quantiles are 0 and 1; reflected at eps."""
    mu = shift(params.tokens or tokens)
    if params.shift_limits is not None:
        mu = min(max(mu, params.shift_limits[0]), params.shift_limits[1])
    low = _sigmoid(mu - _LOW_QUANTILE * params.std)
    high = _sigmoid(mu + _HIGH_QUANTILE * params.std)
    stretched = (torch.sigmoid(normal.float() * params.std + mu) - low) / (high - low)
    reflected = torch.where(stretched >= params.eps, stretched, 2 * params.eps - stretched)
    flat = params.eps + (1 - params.eps) * uniform.float()
    return torch.where(selector > params.uniform_prob, reflected.clamp(0, 1), flat)


def quantiles(params: SigmaDistribution, tokens: Mapping[int, float], count: int) -> list[float]:
    """The medians of `count` equally likely intervals of the training distribution, rounded to three digits.

    tokens: weight by token count, because the shift depends on the token count.
    """
    draws = round(_QUANTILE_DRAWS / sum(tokens.values()))
    parts: list[Tensor] = []
    for size, weight in sorted(tokens.items()):
        stream = rng.generator(0, "quantiles", "", size)
        number = max(1, round(draws * weight))
        normal = torch.randn(number, generator=stream)
        uniform, selector = torch.rand(2, number, generator=stream)
        parts.append(levels(normal, uniform, selector, size, params))
    probabilities = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return [round(float(q), 3) for q in torch.cat(parts).double().quantile(probabilities)]


def inference_schedule(steps: int, tokens: int = INFERENCE_TOKENS) -> Tensor:
    """(steps + 1,) float32 noise levels from 1 down to 0; the last level above zero is 0.1.

    sigma' = e^s / (e^s + 1/sigma - 1) on a linear grid, then 1 - sigma' stretched to end at 0.1.
    """
    grid = torch.linspace(1.0, 0.0, steps + 1)
    scale = math.exp(shift(tokens))
    shifted = scale / (scale + (1 / grid[:-1] - 1))
    distance = 1 - shifted
    stretch = distance[-1] / (1 - _TERMINAL_SIGMA)
    return torch.cat([1 - distance / stretch if steps > 1 else shifted, grid[-1:]])


def distilled_schedule() -> Tensor:
    """(9,) float32: the eight levels that the distilled model was trained on, and 0. Public in diffusers as
    DISTILLED_SIGMA_VALUES."""
    return torch.tensor([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0])


def refining_schedule() -> Tensor:
    """(4,) float32: the last levels of the distilled model, at which a second stage begins, and 0. Public in diffusers
    as STAGE_2_DISTILLED_SIGMA_VALUES."""
    return distilled_schedule()[-_REFINING_STEPS - 1 :]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
