"""One sample's video tokens over several ranks (sequence parallelism, after DeepSpeed-Ulysses, arXiv 2309.14509).

Owns how tokens are cut and brought together inside the transformer; audio, text and everything outside the blocks
are computed on every rank alike. Self-attention sees all tokens of a share of the heads.

Gradients: of a cut tensor each rank has `world` times its part, so that the mean over the ranks, which is what
training takes of every weight's gradient, is the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_groups: list[Any] = []
# torch 2.13 has given it another name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009


@dataclass(frozen=True, slots=True)
class Together:
    """Ranks that take samples together: this one is rank of world; group: what `joined` gave for theirs."""

    rank: int
    world: int
    group: int


def joined(group: Any, rank: int, world: int) -> Together:
    """Of a process group. Compiled code names it by a number."""
    _groups.append(group)
    return Together(rank, world, len(_groups) - 1)


class Part(NamedTuple):
    """This rank's part of `tokens` tokens: equally many on every rank, the last ones filled up with zeros."""

    rank: int
    world: int
    group: int
    tokens: int

    @classmethod
    def of(cls, together: Together, tokens: int) -> Part:
        return cls(together.rank, together.world, together.group, tokens)

    @property
    def size(self) -> int:
        return -(-self.tokens // self.world)

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x along its tokens."""
        return self._filled(x, dim).narrow(dim, self.rank * self.size, self.size)

    def whole(self, x: Tensor) -> Tensor:
        """All ranks' x (B, size, ...) -> (B, tokens, ...)."""
        return collected(x, self.rank, self.world, self.group).transpose(0, 1).flatten(1, 2).narrow(1, 0, self.tokens)

    def over_heads(self, x: Tensor) -> Tensor:
        """(B, size, H, D) -> (B, tokens, H / world, D)."""
        parts = x.unflatten(2, (self.world, -1)).permute(2, 0, 1, 3, 4)
        return exchanged(parts, self.group).permute(1, 0, 2, 3, 4).flatten(1, 2).narrow(1, 0, self.tokens)

    def over_tokens(self, x: Tensor) -> Tensor:
        """(B, tokens, H / world, D) -> (B, size, H, D)."""
        parts = self._filled(x, 1).unflatten(1, (self.world, self.size)).transpose(0, 1)
        return exchanged(parts, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def read_by_all(self, x: Tensor) -> Tensor:
        """x, which every rank has, on its way to cut tensors: its gradient is the ranks' mean."""
        return read_by_all(x, self.world, self.group)

    def _filled(self, x: Tensor, dim: int) -> Tensor:
        missing = self.size * self.world - x.shape[dim]
        return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x


@torch.library.custom_op("ltx_train::exchanged", mutates_args=())
def exchanged(parts: Tensor, group: int) -> Tensor:
    """(world, ...): part i goes to rank i, and what rank i sent stands at i."""
    given = parts.contiguous()
    received = torch.empty_like(given)
    dist.all_to_all_single(received, given, group=_groups[group])
    return received


@torch.library.custom_op("ltx_train::collected", mutates_args=())
def collected(x: Tensor, _rank: int, world: int, group: int) -> Tensor:
    """(...) -> (world, ...): every rank's x."""
    given = x.contiguous()
    received = given.new_empty((world, *given.shape))
    _all_gather(received.flatten(0, 1), given, group=_groups[group])
    return received


@torch.library.custom_op("ltx_train::read_by_all", mutates_args=())
def read_by_all(x: Tensor, _world: int, _group: int) -> Tensor:
    """x, of which every rank's gradient becomes the mean."""
    return x.clone()


@torch.library.custom_op("ltx_train::averaged", mutates_args=())
def averaged(x: Tensor, world: int, group: int) -> Tensor:
    """The mean of the ranks' x, summed in float32."""
    total = x.float().contiguous()
    # An operator may not change what it is given.
    total = total.clone() if total.data_ptr() == x.data_ptr() else total
    dist.all_reduce(total, group=_groups[group])
    return (total / world).to(x.dtype)


@exchanged.register_fake
def _(parts: Tensor, _group: int) -> Tensor:
    return torch.empty_like(parts, memory_format=torch.contiguous_format)


@collected.register_fake
def _(x: Tensor, _rank: int, world: int, _group: int) -> Tensor:
    return x.new_empty((world, *x.shape))


@read_by_all.register_fake
def _(x: Tensor, _world: int, _group: int) -> Tensor:
    return torch.empty_like(x)


@averaged.register_fake
def _(x: Tensor, _world: int, _group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.given = inputs[1:]


# As the operators' own, and not of autograd Functions around them: of those the compiler keeps every result for
# backward, whatever a checkpoint says.
exchanged.register_autograd(
    lambda ctx, gradient: (exchanged(gradient, *ctx.given), None), setup_context=_remember
)  # fmt: skip
collected.register_autograd(
    lambda ctx, gradient: (gradient[ctx.given[0]] * ctx.given[1], None, None, None), setup_context=_remember
)
read_by_all.register_autograd(
    lambda ctx, gradient: (averaged(gradient, *ctx.given), None, None), setup_context=_remember
)
