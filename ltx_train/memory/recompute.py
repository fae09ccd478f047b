"""How each block is run: what of it is kept for backward, whether it is compiled, streamed, offloaded.

Owns the choice per block and the order of the wrappers: markers of the weight stream and of the
offload outside, the compiled call inside them, the checkpoint innermost. With the checkpoint inside,
the compiler sees recomputation and backward as one graph and drops what backward does not read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ltx_train.memory.compile import compiled_call
from ltx_train.memory.offload import InputOffload
from ltx_train.memory.stream import WeightStream
from ltx_train.model.lowered import Lowered
from ltx_train.model.transformer import Block, Pair

Call = Callable[..., Pair]
Probe = Callable[..., None]


class Keep(StrEnum):
    """What of a block stays in memory between forward and backward.

    everything: nothing is computed twice. attention: attention outputs stay, the rest is computed
    again. inputs: the whole block is computed again.
    """

    everything = "everything"
    attention = "attention"
    inputs = "inputs"


class Beside(Protocol):
    """Work on streams of its own, beside the blocks."""

    def fork(self) -> None:
        """Becomes part of the CUDA graph that is being recorded, where earlier events mean nothing."""
        ...

    def join(self) -> None:
        """The recording ends behind it."""
        ...


class BlockRunner:
    """`transformer.run_block`: calls block `index` the way it was planned."""

    def __init__(
        self, keep: Sequence[Keep], *, compiled: bool, stream: WeightStream | None = None,
        offload: InputOffload | None = None,
    ) -> None:  # fmt: skip
        self._keep, self.stream, self._offload = list(keep), stream, offload
        self.beside: list[Beside] = [copies for copies in (stream, offload) if copies is not None]
        calls: dict[Keep, Call] = {Keep.everything: _call, Keep.inputs: _recomputed, Keep.attention: _keeping_attention}
        self._calls = {kind: compiled_call(call) if compiled else call for kind, call in calls.items()}
        self._lowered: dict[int, Lowered] = {}
        self._probe: Probe | None = None
        # Called with a block's number when its gradients are complete.
        self.complete: Callable[[int], None] | None = None

    @contextmanager
    def probed(self, probe: Probe) -> Generator[None]:
        """Within the context, `probe` is called with every block's arguments in passes without gradient, while the
        block's weights are on the device."""
        self._probe = probe
        try:
            yield
        finally:
            self._probe = None

    def rewind(self) -> None:
        """Weights on the device are those that a pass begins with."""
        if self.stream is not None:
            self.stream.rewind()

    @contextmanager
    def recorded(self) -> Generator[Callable[[], None]]:
        """While a CUDA graph records a training pass; yields what to call after each replay."""
        for work in self.beside:
            work.fork()
        yield (lambda: None) if self.stream is None else self.stream.replayed
        for work in self.beside:
            work.join()

    def __call__(self, index: int, block: Block, video: Any, audio: Any, *rest: Any) -> Pair:
        streamed = self.stream is not None and index in self.stream
        if not torch.is_grad_enabled():
            return self._without_gradient(index, streamed, block, video, audio, *rest)
        # All blocks alike: the first one's input wants no gradient by itself, which would be another graph
        # to compile, and its marker would not fire.
        video, audio = (None if h is None else h if h.requires_grad else h.requires_grad_() for h in (video, audio))
        if streamed or self.complete is not None or (self._offload is not None and index in self._offload):
            return self._marked(index, streamed, block, video, audio, *rest)
        self._lower(index, block, video, audio)
        return self._calls[self._keep[index]](block, video, audio, *rest)

    def _lower(self, index: int, block: Block, video: Any, audio: Any) -> None:
        if index not in self._lowered:
            self._lowered[index] = Lowered(block)
        self._lowered[index].lower(next(h.dtype for h in (video, audio) if h is not None))

    def _without_gradient(self, index: int, streamed: bool, block: Block, *arguments: Any) -> Pair:
        """Validation and sampling."""
        if streamed and self.stream is not None:
            self.stream.begin(index, backward=False, training=False)
        if self._probe is not None:
            self._probe(index, block, *arguments)
        result = self._calls[Keep.everything](block, *arguments)
        if streamed and self.stream is not None:
            self.stream.end(index)
        return result

    def _marked(self, index: int, streamed: bool, block: Block, video: Any, audio: Any, *rest: Any) -> Pair:
        if streamed and self.stream is not None:
            self.stream.begin(index, backward=False, training=True)
        given = mark(partial(self._backward_ends, index, streamed), (video, audio))
        # Behind the marker, so that the adapter's gradients are added before backward comes through it.
        self._lower(index, block, video, audio)
        pair = self._calls[self._keep[index]](block, *given, *rest)
        if streamed and self.stream is not None:
            self.stream.end(index)
        if self._offload is not None and index in self._offload:
            self._offload.send(index, [h for h in given if h is not None])
        return mark(partial(self._backward_begins, index, streamed), pair)

    def _backward_begins(self, index: int, streamed: bool) -> None:
        if self._offload is not None and index in self._offload:
            self._offload.fetch(index)
        if streamed and self.stream is not None:
            self.stream.begin(index, backward=True, training=True)

    def _backward_ends(self, index: int, streamed: bool) -> None:
        # The engine accumulates into parameters before it goes on to what came earlier in forward, as the marker did.
        if self.complete is not None:
            self.complete(index)
        if streamed and self.stream is not None:
            self.stream.end(index)


class Marker(torch.autograd.Function):
    """Identity over all streams of tokens jointly; calls back when backward comes through."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(h.view_as(h) for h in hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return None, *gradients


def mark(call: Callable[[], None], pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """Puts the marker on whichever of (video, audio) is there."""
    present = [h for h in pair if h is not None]
    marked: Any = iter(Marker.apply(call, *present))  # pyright: ignore[reportArgumentType]
    first, second = (None if h is None else next(marked) for h in pair)
    return first, second


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which blocks are streamed, what each keeps, and whose inputs wait on the host."""

    streamed: list[int]
    keep: list[Keep]
    offloaded: list[int]


def arrange(layers: int, keep: Keep, keep_everything: int, stream_blocks: int, offload_inputs: bool) -> Arrangement:
    """Counts to indices: all evenly spaced; resident blocks are the first to keep everything."""
    streamed = spread(min(stream_blocks, layers), layers)
    resident = [i for i in range(layers) if i not in set(streamed)]
    more: set[int] = set()
    for blocks in (resident, streamed):
        more |= {blocks[i] for i in spread(min(keep_everything - len(more), len(blocks)), len(blocks))}
    kept = [Keep.everything if i in more else keep for i in range(layers)]
    waiting = [i for i in range(layers) if offload_inputs and kept[i] is not Keep.everything]
    return Arrangement(streamed, kept, waiting)


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced: streamed blocks get compute between them to hide behind."""
    return [i for i in range(total) if (i * count) // total != ((i + 1) * count) // total]


def _call(block: Block, *arguments: Any) -> Pair:
    return block(*arguments)


def _recomputed(block: Block, video: Any, audio: Any, *rest: Any) -> Pair:
    """Masks of dropout are keyed, so no random state has to be kept for the second computation."""
    result: Any = checkpoint(
        lambda v, a: block(v, a, *rest), video, audio, use_reentrant=False, preserve_rng_state=False
    )
    return result


def _keeping_attention(block: Block, video: Any, audio: Any, *rest: Any) -> Pair:
    contexts = partial(create_selective_checkpoint_contexts, _attention_policy)
    result: Any = checkpoint(
        lambda v, a: block(v, a, *rest), video, audio, use_reentrant=False, preserve_rng_state=False,
        context_fn=contexts,
    )  # fmt: skip
    return result


def _attention_policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operation in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
