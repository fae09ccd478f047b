"""One sample's video tokens over several ranks (sequence parallelism, after DeepSpeed-Ulysses, arXiv 2309.14509).

Owns how tokens are sliced and gathered inside the transformer. Audio, text and everything outside the blocks are
computed on every rank alike. Self-attention sees all tokens of a part of the heads.

Gradients: each rank scales the gradient of its token slice by `world`, so that the usual mean over the ranks equals
the gradient of a single process.
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
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that share each sample's tokens: this process is rank of world; group: from `register_group`."""

    rank: int
    world: int
    group: int


def register_group(group: Any, rank: int, world: int) -> SequenceGroup:
    """Registers a process group under a number, because compiled code cannot hold the object."""
    _groups.append(group)
    return SequenceGroup(rank, world, len(_groups) - 1)


class TokenSlice(NamedTuple):
    """This rank's slice of `tokens` tokens. All slices have equal length; the last ones are padded with zeros."""

    rank: int
    world: int
    group: int
    tokens: int

    @classmethod
    def of(cls, group: SequenceGroup, tokens: int) -> TokenSlice:
        return cls(group.rank, group.world, group.group, tokens)

    @property
    def size(self) -> int:
        return -(-self.tokens // self.world)

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice of x along its token dimension."""
        return self._padded(x, dim).narrow(dim, self.rank * self.size, self.size)

    def whole(self, x: Tensor) -> Tensor:
        """All-gather of the slices: (B, size, ...) -> (B, tokens, ...)."""
        gathered = all_gathered(x, self.rank, self.world, self.group)
        return gathered.transpose(0, 1).flatten(1, 2).narrow(1, 0, self.tokens)

    def over_heads(self, x: Tensor) -> Tensor:
        """All-to-all from tokens to heads: (B, size, H, D) -> (B, tokens, H / world, D)."""
        parts = x.unflatten(2, (self.world, -1)).permute(2, 0, 1, 3, 4)
        return all_to_all(parts, self.group).permute(1, 0, 2, 3, 4).flatten(1, 2).narrow(1, 0, self.tokens)

    def over_tokens(self, x: Tensor) -> Tensor:
        """All-to-all from heads to tokens: (B, tokens, H / world, D) -> (B, size, H, D)."""
        parts = self._padded(x, 1).unflatten(1, (self.world, self.size)).transpose(0, 1)
        return all_to_all(parts, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def averaged_in_backward(self, x: Tensor) -> Tensor:
        """x, which every rank has whole and which is read by sliced tokens: its gradient is averaged over the group."""
        return averaged_in_backward(x, self.world, self.group)

    def _padded(self, x: Tensor, dim: int) -> Tensor:
        missing = self.size * self.world - x.shape[dim]
        return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x


@torch.library.custom_op("ltx_train::all_to_all", mutates_args=())
def all_to_all(parts: Tensor, group: int) -> Tensor:
    """(world, ...): part i goes to rank i; entry i of the result came from rank i."""
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=_groups[group])
    return received


@torch.library.custom_op("ltx_train::all_gathered", mutates_args=())
def all_gathered(x: Tensor, _rank: int, world: int, group: int) -> Tensor:
    """(...) -> (world, ...): every rank's x."""
    sent = x.contiguous()
    received = sent.new_empty((world, *sent.shape))
    all_gather(received.flatten(0, 1), sent, group=_groups[group])
    return received


@torch.library.custom_op("ltx_train::averaged_in_backward", mutates_args=())
def averaged_in_backward(x: Tensor, _world: int, _group: int) -> Tensor:
    """Identity in forward; averages the gradient over the group in backward."""
    return x.clone()


@torch.library.custom_op("ltx_train::averaged", mutates_args=())
def averaged(x: Tensor, world: int, group: int) -> Tensor:
    """The mean of the ranks' x, summed in float32."""
    total = x.float().contiguous()
    # A custom operator may not change its arguments.
    total = total.clone() if total.data_ptr() == x.data_ptr() else total
    dist.all_reduce(total, group=_groups[group])
    return (total / world).to(x.dtype)


@all_to_all.register_fake
def _(parts: Tensor, _group: int) -> Tensor:
    return torch.empty_like(parts, memory_format=torch.contiguous_format)


@all_gathered.register_fake
def _(x: Tensor, _rank: int, world: int, _group: int) -> Tensor:
    return x.new_empty((world, *x.shape))


@averaged_in_backward.register_fake
def _(x: Tensor, _world: int, _group: int) -> Tensor:
    return torch.empty_like(x)


@averaged.register_fake
def _(x: Tensor, _world: int, _group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.arguments = inputs[1:]


# Custom operators with gradients, because torch 2.11's compiler saves the outputs of `autograd.Function` even inside a
# checkpoint. Custom operators are recomputed like everything else.
all_to_all.register_autograd(
    lambda ctx, gradient: (all_to_all(gradient, *ctx.arguments), None), setup_context=_save_arguments
)
all_gathered.register_autograd(
    lambda ctx, gradient: (gradient[ctx.arguments[0]] * ctx.arguments[1], None, None, None),
    setup_context=_save_arguments,
)
averaged_in_backward.register_autograd(
    lambda ctx, gradient: (averaged(gradient, *ctx.arguments), None, None), setup_context=_save_arguments
)
