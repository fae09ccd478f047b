"""How each block is run: recomputed, compiled, streamed, offloaded.

Owns the order of the wrappers. Outside are the markers of the weight stream and of the input offload, inside them the
compiled call, innermost the checkpoint:

    marker( compiled( checkpoint( block ) ) )

With the checkpoint inside, the compiler sees recomputation and backward as one graph and drops what backward does not
read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ltx_train.memory.activations.input_offload import InputOffload
from ltx_train.memory.blocks.cast_adapters import CastAdapters
from ltx_train.memory.blocks.compile import compiled_call
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.model.transformer import Block, Pair

Call = Callable[..., Pair]
Probe = Callable[..., Pair | None]


class SideStream(Protocol):
    """Work on a CUDA stream of its own, beside the blocks, that a CUDA graph has to include."""

    def fork(self) -> None:
        """Joins the recording that has begun on the current stream."""
        ...

    def join(self) -> None:
        """The current stream waits for the side stream; the recording may end."""
        ...

    def rewind(self) -> None:
        """The current stream waits for everything that this stream has begun outside the recording.

        Kernels of a graph know events of the graph alone. Without this wait a replay could overwrite memory that eager
        work of the pass before still reads.
        """
        ...


class BlockWeights(Protocol):
    """Weights that come and go: of a block that is in it, they are there between `begin` and `end`."""

    def __contains__(self, index: int) -> bool: ...

    def begin(self, index: int, *, backward: bool, training: bool) -> None: ...

    def end(self, index: int) -> None: ...


class BlockRunner:
    """`transformer.run_block`: calls block `index` in the planned way.

    keep: per block. After construction, updates that slice gradients register themselves with `reduce_with`.
    """

    def __init__(
        self, keep: Sequence[Keep], *, compiled: bool, stream: BlockWeights | None = None,
        offload: InputOffload | None = None,
    ) -> None:  # fmt: skip
        self._keep, self.stream, self._offload = list(keep), stream, offload
        copies = (stream if isinstance(stream, WeightStream) else None, offload)
        self._side_streams: list[SideStream] = [side for side in copies if side is not None]
        calls: dict[Keep, Call] = {Keep.everything: _call, Keep.inputs: _recomputed, Keep.attention: _keeping_attention}
        self._calls = {kind: compiled_call(call) if compiled else call for kind, call in calls.items()}
        self._casts: dict[int, CastAdapters] = {}
        self._probe: Probe | None = None
        self._reduce: Callable[[int], None] | None = None

    def reduce_with(self, reduce: Callable[[int], None], side_stream: SideStream) -> None:
        """`reduce(index)` is called as soon as a block's gradients are complete; it works on `side_stream`."""
        self._reduce = reduce
        self._side_streams.append(side_stream)

    @contextmanager
    def probed(self, probe: Probe) -> Generator[None]:
        """Within the context, `probe` is called with every block's arguments in passes without gradient, while the
        block's weights are on the device. A block is not called where the probe returns its outputs."""
        self._probe = probe
        try:
            yield
        finally:
            self._probe = None

    def rewind(self) -> None:
        """Brings every side stream into the state in which a recorded pass begins."""
        for side in self._side_streams:
            side.rewind()

    @contextmanager
    def recording(self) -> Generator[Callable[[], None]]:
        """Encloses the recording of a training pass as a CUDA graph; yields what to call after each replay."""
        for side in self._side_streams:
            side.fork()
        yield self.stream.replayed if isinstance(self.stream, WeightStream) else lambda: None
        for side in self._side_streams:
            side.join()

    def __call__(self, index: int, block: Block, video: Any, audio: Any, *rest: Any, **flags: bool) -> Pair:
        streamed = self.stream is not None and index in self.stream
        if not torch.is_grad_enabled():
            return self._without_gradient(index, streamed, block, video, audio, *rest, **flags)
        # The first block's input requires no gradient by itself. It gets one, so that all blocks compile to one graph
        # and its marker fires in backward.
        video, audio = (None if h is None else h if h.requires_grad else h.requires_grad_() for h in (video, audio))
        if streamed or self._reduce is not None or self._is_offloaded(index):
            return self._marked(index, streamed, block, video, audio, *rest, **flags)
        self._cast(index, block, video, audio)
        return self._calls[self._keep[index]](block, video, audio, *rest, **flags)

    def _is_offloaded(self, index: int) -> bool:
        return self._offload is not None and index in self._offload

    def _cast(self, index: int, block: Block, video: Any, audio: Any) -> None:
        if index not in self._casts:
            self._casts[index] = CastAdapters(block)
        self._casts[index].cast(next(h.dtype for h in (video, audio) if h is not None))

    def _without_gradient(self, index: int, streamed: bool, block: Block, *arguments: Any, **flags: bool) -> Pair:
        """Validation and sampling."""
        if streamed and self.stream is not None:
            self.stream.begin(index, backward=False, training=False)
        result = None if self._probe is None else self._probe(index, block, *arguments, **flags)
        if result is None:
            result = self._calls[Keep.everything](block, *arguments, **flags)
        if streamed and self.stream is not None:
            self.stream.end(index)
        return result

    def _marked(
        self, index: int, streamed: bool, block: Block, video: Any, audio: Any, *rest: Any, **flags: bool
    ) -> Pair:
        if streamed and self.stream is not None:
            self.stream.begin(index, backward=False, training=True)
        inputs = mark(partial(self._backward_ends, index, streamed), (video, audio))
        # Behind the marker in forward, so before it in backward: the adapter's gradients are complete when it fires.
        self._cast(index, block, video, audio)
        pair = self._calls[self._keep[index]](block, *inputs, *rest, **flags)
        if streamed and self.stream is not None:
            self.stream.end(index)
        if self._offload is not None and index in self._offload:
            self._offload.send(index, [h for h in inputs if h is not None])
        return mark(partial(self._backward_begins, index, streamed), pair)

    def _backward_begins(self, index: int, streamed: bool) -> None:
        if self._offload is not None and index in self._offload:
            self._offload.fetch(index)
        if streamed and self.stream is not None:
            self.stream.begin(index, backward=True, training=True)

    def _backward_ends(self, index: int, streamed: bool) -> None:
        # autograd accumulates into a block's parameters before it continues with earlier nodes such as the marker.
        if self._reduce is not None:
            self._reduce(index)
        if streamed and self.stream is not None:
            self.stream.end(index)


class Marker(torch.autograd.Function):
    """Identity over all streams of tokens jointly; calls back when backward passes it."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(h.view_as(h) for h in hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return None, *gradients


def mark(call: Callable[[], None], pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """Puts a marker on the present ones of (video, audio)."""
    present = [h for h in pair if h is not None]
    marked: Any = iter(Marker.apply(call, *present))  # pyright: ignore[reportArgumentType]
    first, second = (None if h is None else next(marked) for h in pair)
    return first, second


def _call(block: Block, *arguments: Any, **flags: bool) -> Pair:
    # The class's forward, without hooks: those of another engine lie outside (`hooked`).
    return Block.forward(block, *arguments, **flags)


def _recomputed(block: Block, video: Any, audio: Any, *rest: Any, **flags: bool) -> Pair:
    """Dropout masks are keyed, so no random state has to be kept for the recomputation."""
    result: Any = checkpoint(
        lambda v, a: Block.forward(block, v, a, *rest, **flags), video, audio, use_reentrant=False,
        preserve_rng_state=False,
    )  # fmt: skip
    return result


def _keeping_attention(block: Block, video: Any, audio: Any, *rest: Any, **flags: bool) -> Pair:
    result: Any = checkpoint(
        lambda v, a: Block.forward(block, v, a, *rest, **flags), video, audio, use_reentrant=False,
        preserve_rng_state=False, context_fn=_attention_contexts,
    )  # fmt: skip
    return result


def _attention_contexts() -> Any:
    return create_selective_checkpoint_contexts(_attention_policy)


def _attention_policy(_context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Keeps self-attention, which has as many keys as queries. Computing an output again costs as much as it has keys,
    and the other attentions read few: the text's, or those of the sound."""
    is_kept = operation in _ATTENTION and arguments[0].shape[-2] == arguments[1].shape[-2]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# The compiler caches a graph with a policy only under a name of that policy: a changed one must not find old graphs.
_attention_contexts.__dict__["cache_hash"] = inspect.getsource(_attention_policy) + str(sorted(map(str, _ATTENTION)))
