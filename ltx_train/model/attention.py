"""Attention over the diffusers projections: rotary split, log-strength masks, per-head gates.

Owns one attention call. Masks stay broadcast over heads, which a mask per head (64 times the
memory at 12k tokens) would not.
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
    """Keys and values (B, size, H, D) whose tokens are sliced over ranks. queries_too: so are the queries'."""

    token_slice: TokenSlice
    queries_too: bool

    def gathered(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens: of a part of the heads (all-to-all), or of all heads where every rank has all queries."""
        own = self.token_slice
        if self.queries_too:
            return own.over_heads(query), own.over_heads(key), own.over_heads(value)
        return query, own.whole(key), own.whole(value)

    def sliced(self, mixed: Tensor) -> Tensor:
        return self.token_slice.over_tokens(mixed) if self.queries_too else mixed


def bias_from_strength(strength: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive bias log(strength) in `dtype`, with the lowest finite value where strength is 0.

    strength: (B, Tq, Tk) or (B, Tk) in [0, 1]; returns (B, 1, Tq or 1, Tk).
    """
    if strength is None:
        return None
    values = strength.float()
    # Not minus infinity: a row of nothing else would be NaN.
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
    """Attention through the projections of an `LTX2Attention`, of hidden (B, Tq, D)
    over context (B, Tk, Dc), or over itself when context is None.

    values_only replaces the attention by its value projection (spatio-temporal guidance). token_slice: the keys'
    tokens are sliced over ranks, and when context is None the queries' too; bias is over all tokens.
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
    """The share of attention that the queries at `rows` give to the keys from `first_key` on: mean over batch, heads
    and queries, of self-attention over hidden (B, T, D)."""
    query = rotated(_heads(module, module.norm_q(module.to_q(hidden))), rotary)[:, rows].transpose(1, 2)
    key = rotated(_heads(module, module.norm_k(module.to_k(hidden))), rotary).transpose(1, 2)
    total = torch.zeros((), device=hidden.device)
    for head in range(key.shape[1]):  # one at a time: all at once would not fit beside a planned model
        logits = query[:, head].float() @ key[:, head].float().transpose(-1, -2) / query.shape[-1] ** 0.5
        if bias is not None:
            logits = logits + (bias[:, 0, rows] if bias.shape[2] > 1 else bias[:, 0]).float()
        total = total + logits.softmax(dim=-1)[..., first_key:].sum(dim=-1).mean()
    return float(total) / key.shape[1]


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """x (B, T, H, D) turned by the angles whose (cos, sin) are (B, H, T, D / 2), in float32; pairs are (i, i + D / 2).

    The halves are swapped by a flip: one elementwise kernel each way, where writing them one after the
    other takes four.
    """
    cos, sin = (table.transpose(1, 2).unsqueeze(-2) for table in rotary)
    halves = x.float().unflatten(-1, (2, -1))
    sign = 2 * torch.arange(2, device=x.device)[:, None] - 1
    return (halves * cos + halves.flip(-2) * (sin * sign)).flatten(-2).to(x.dtype)


def _heads(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (module.heads, -1))
