"""Attention over the diffusers projections: split rotary embedding, log-strength masks, per-head gates.

Owns one attention call. Masks are broadcast over heads, because a mask per head takes 64 times the memory at
12k tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_train.distributed.sequence import TokenSlice
from ltx_train.model.linear import products

Rotary = tuple[Tensor, Tensor]


class SlicedKeys(NamedTuple):
    """The token slice of keys and values (B, size, H, D). queries_too: the queries are sliced in the same way."""

    token_slice: TokenSlice
    queries_too: bool

    def gathered(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all tokens.

        With sliced queries an all-to-all leaves a part of the heads on this rank. Otherwise every rank has all queries
        and gathers the keys and values of all heads.
        """
        tokens = self.token_slice
        if self.queries_too:
            return tokens.over_heads(query), tokens.over_heads(key), tokens.over_heads(value)
        return query, tokens.whole(key), tokens.whole(value)

    def sliced(self, mixed: Tensor) -> Tensor:
        """The attention output of this rank's queries, with all heads."""
        return self.token_slice.over_tokens(mixed) if self.queries_too else mixed


def bias_from_strength(strength: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive bias log(strength) in `dtype`, with the lowest finite value where strength is 0.

    strength: (B, Tq, Tk) or (B, Tk) in [0, 1]; returns (B, 1, Tq or 1, Tk).
    """
    if strength is None:
        return None
    values = strength.float()
    # Not minus infinity: the softmax of a row of minus infinities would be NaN.
    lowest = torch.finfo(dtype).min
    bias = torch.where(values > 0, values.clamp_min(torch.finfo(torch.float32).tiny).log(), lowest)
    return bias.to(dtype)[:, None] if strength.ndim == 3 else bias.to(dtype)[:, None, None]


def attend(
    module: Any,
    hidden: Tensor,
    context: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    rotary: Rotary | None = None,
    key_rotary: Rotary | None = None,
    values_only: bool = False,
    token_slice: TokenSlice | None = None,
) -> Tensor:
    """Attention of hidden (B, Tq, D) over context (B, Tk, Dc), with the projections of an `LTX2Attention`. Without
    context it is self-attention.

    values_only replaces the attention by its value projection (spatio-temporal guidance). token_slice: the keys are
    sliced over ranks by token, in self-attention the queries too. bias always covers all tokens.
    """
    if values_only:
        mixed = module.to_v(hidden if context is None else context)
    else:
        keys = None if token_slice is None else SlicedKeys(token_slice, context is None)
        mixed = _weighted(
            module, _projected(module, hidden, context), bias=bias, rotary=rotary, key_rotary=key_rotary, sliced=keys
        )
    gate = 2.0 * torch.sigmoid(module.to_gate_logits(hidden))
    mixed = (_heads(module, mixed) * gate[..., None]).flatten(2)
    return module.to_out[0](mixed)


def _projected(module: Any, hidden: Tensor, context: Tensor | None) -> list[Tensor]:
    """Queries, keys and values (B, T, D)."""
    if context is None:
        return products([module.to_q, module.to_k, module.to_v], hidden)
    return [module.to_q(hidden), *products([module.to_k, module.to_v], context)]


def _weighted(
    module: Any,
    projected: list[Tensor],
    *,
    bias: Tensor | None,
    rotary: Rotary | None,
    key_rotary: Rotary | None,
    sliced: SlicedKeys | None,
) -> Tensor:
    query, key, value = projected
    query, key = _heads(module, module.norm_q(query)), _heads(module, module.norm_k(key))
    if rotary is not None:
        query = rotated(query, rotary)
        key = rotated(key, rotary if key_rotary is None else key_rotary)
    value = _heads(module, value)
    if sliced is not None:
        query, key, value = sliced.gathered(query, key, value)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
    return (mixed if sliced is None else sliced.sliced(mixed)).flatten(2)


def key_mass(
    module: Any, hidden: Tensor, rotary: Rotary, *, bias: Tensor | None, rows: Tensor, first_key: int
) -> float:
    """The attention weight of the keys from `first_key` on, for the queries at `rows`, in self-attention over hidden
    (B, T, D). Returns the mean over batch, heads and queries."""
    query = rotated(_heads(module, module.norm_q(module.to_q(hidden))), rotary)[:, rows].transpose(1, 2)
    key = rotated(_heads(module, module.norm_k(module.to_k(hidden))), rotary).transpose(1, 2)
    total = torch.zeros((), device=hidden.device)
    for head in range(key.shape[1]):  # per head: the logits of all heads would not fit into the memory plan
        logits = query[:, head].float() @ key[:, head].float().transpose(-1, -2) / query.shape[-1] ** 0.5
        if bias is not None:
            logits = logits + (bias[:, 0, rows] if bias.shape[2] > 1 else bias[:, 0]).float()
        total = total + logits.softmax(dim=-1)[..., first_key:].sum(dim=-1).mean()
    return float(total) / key.shape[1]


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """x (B, T, H, D) rotated in float32 by angles with (cos, sin) of (B, H, T, D / 2). Pairs are (i, i + D / 2).

    A flip swaps the halves, which compiles to one elementwise kernel each in forward and backward. Computing the halves
    one after the other takes four.
    """
    cos, sin = (table.transpose(1, 2).unsqueeze(-2) for table in rotary)
    halves = x.float().unflatten(-1, (2, -1))
    sign = 2 * torch.arange(2, device=x.device)[:, None] - 1
    return (halves * cos + halves.flip(-2) * (sin * sign)).flatten(-2).to(x.dtype)


def _heads(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (module.heads, -1))
