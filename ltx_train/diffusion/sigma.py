"""Noise levels: how sigma is drawn for training and how it is scheduled for sampling.

All values are float32 in [0, 1]. The formulas are those of the LTX-2 reference; the line through
(1024 tokens, 0.95) and (4096 tokens, 2.05) is shared by training and sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SLOPE = (2.05 - 0.95) / (4096 - 1024)
# Quantiles of the standard normal at 0.5 % and 99.9 %: the draw is stretched so that they map to 0 and 1.
_LOW_QUANTILE, _HIGH_QUANTILE = 2.5758, 3.0902
_TERMINAL_SIGMA = 0.1
INFERENCE_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class SigmaDistribution:
    """Parameters of the shifted logit-normal: spread, smallest level, and the share drawn uniformly instead."""

    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1


def shift(tokens: int) -> float:
    """mu of the distribution for a token count; linear and, as in the reference, not limited."""
    return 0.95 + _SLOPE * (tokens - 1024)


def shifted_logit_normal(
    normal: Tensor, uniform: Tensor, selector: Tensor, tokens: int, params: SigmaDistribution
) -> Tensor:
    """sigma from three independent random tensors of one shape (standard normal, U[0,1), U[0,1)).

    Returns float32 of the same shape in [0, 1].
    """
    mu = shift(tokens)
    low = _sigmoid(mu - _LOW_QUANTILE * params.std)
    high = _sigmoid(mu + _HIGH_QUANTILE * params.std)
    stretched = (torch.sigmoid(normal.float() * params.std + mu) - low) / (high - low)
    reflected = torch.where(stretched >= params.eps, stretched, 2 * params.eps - stretched)
    flat = params.eps + (1 - params.eps) * uniform.float()
    return torch.where(selector > params.uniform_prob, reflected.clamp(0, 1), flat)


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
