"""Noise levels: how sigma is drawn for training and how it is scheduled for sampling.

All values are float32 in [0, 1]. The formulas are those of the LTX-2 reference; the line through
(1024 tokens, 0.95) and (4096 tokens, 2.05) is shared by training and sampling.
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
# Quantiles of the standard normal at 0.5 % and 99.9 %: the draw is stretched so that they map to 0 and 1.
_LOW_QUANTILE, _HIGH_QUANTILE = 2.5758, 3.0902
_TERMINAL_SIGMA = 0.1
_QUANTILE_DRAWS = 1 << 18
INFERENCE_TOKENS = 4096


class SigmaKind(StrEnum):
    """shifted_logit_normal is the reference's; high is uniform with more weight on the highest levels."""

    shifted_logit_normal = "shifted_logit_normal"
    logit_normal = "logit_normal"
    uniform = "uniform"
    high = "high"


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaDistribution:
    """Parameters of the distribution of noise levels.

    std: of both logit-normals, mean: of the unshifted one. eps: smallest level, uniform_prob: share drawn from
    U[eps, 1], of the shifted one; tokens: the token count that sets its shift (None: the sample's own), shift_limits:
    bounds of the shift (None: unlimited, as in the reference). low, high: ends of the uniform one. high_prob: share
    that `high` draws from U[high_from, 1] instead of U[0, 1].
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
    """mu of the distribution for a token count; linear and, as in the reference, not limited."""
    return 0.95 + _SLOPE * (tokens - 1024)


def levels(normal: Tensor, uniform: Tensor, selector: Tensor, tokens: int, params: SigmaDistribution) -> Tensor:
    """sigma from three independent random tensors of one shape (standard normal, U[0,1), U[0,1)).

    Returns float32 of the same shape in [0, 1].
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
    """The reference's distribution: stretched so that its 0.5 % and 99.9 % quantiles are 0 and 1, reflected at eps."""
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
    """The middles of `count` equally likely slices of what training draws, three digits.

    tokens: token counts and their weights, since the shift depends on them.
    """
    draws = round(_QUANTILE_DRAWS / sum(tokens.values()))
    parts: list[Tensor] = []
    for size, weight in sorted(tokens.items()):
        stream = rng.generator(0, "quantiles", "", size)
        number = max(1, round(draws * weight))
        normal = torch.randn(number, generator=stream)
        uniform, selector = torch.rand(2, number, generator=stream)
        parts.append(levels(normal, uniform, selector, size, params))
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return [round(float(q), 3) for q in torch.cat(parts).double().quantile(places)]


def inference_schedule(steps: int, tokens: int = INFERENCE_TOKENS) -> Tensor:
    """steps + 1 noise levels from 1 down to 0, float32; the last level above zero is 0.1.

    sigma' = e^s / (e^s + 1/sigma - 1) on a linear grid, then 1 - sigma' stretched to end at 0.1.
    """
    grid = torch.linspace(1.0, 0.0, steps + 1)
    scale = math.exp(shift(tokens))
    shifted = scale / (scale + (1 / grid[:-1] - 1))
    distance = 1 - shifted
    stretch = distance[-1] / (1 - _TERMINAL_SIGMA)
    return torch.cat([1 - distance / stretch if steps > 1 else shifted, grid[-1:]])


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
