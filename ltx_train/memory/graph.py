"""A step's forward and backward as one CUDA graph per shape, for GPUs that finish kernels sooner than a host launches.

Owns capture and replay, and the tensors that a graph reads and writes at fixed addresses. What a step
computes is given to it. Of every shape the first step runs without a graph: it compiles and warms up.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltx_train.diffusion.transfer import mapped
from ltx_train.memory.recompute import BlockRunner

Work = Callable[[Any], Any]
Replay = Callable[[], Any]


class Recorder(Protocol):
    """Turns work on fixed tensors into something that repeats it."""

    def record(self, work: Callable[[], Any]) -> Replay: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Recorded:
    given: list[Tensor]
    replay: Replay


class StepGraphs:
    """`graphs(given)` does `work(given)`, which adds to the parameters' gradients; recorded from a shape's second step
    on.

    given and the result are nested dataclasses of tensors on the device and plain values; plain values are part of
    what is recorded. Gradients stay where they are between steps: zero them, do not drop them.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter], recorder: Recorder) -> None:
        self._work, self._parameters, self._recorder = work, list(parameters), recorder
        self._known: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._gradients: list[Tensor] = []

    def __call__(self, given: Any) -> Any:
        shape = signature(given)
        if shape not in self._known:
            self.release()  # a step without a graph needs the memory that graphs hold
            self._known.add(shape)
            return self._work(given)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(given)
        if any(p.grad is not g for p, g in zip(self._parameters, self._gradients, strict=True)):
            raise RuntimeError("a gradient that a recorded step writes to was replaced")
        recorded = self._recorded[shape]
        for mine, theirs in zip(recorded.given, self._tensors(given), strict=True):
            mine.copy_(theirs, non_blocking=True)
        return recorded.replay()

    def release(self) -> None:
        """Gives back what the graphs hold; the next step of a known shape records again."""
        if self._recorded:
            self._recorded.clear()
            self._recorder.release()

    def _record(self, given: Any) -> _Recorded:
        # A recording adds to addresses: gradients must exist before it, and stay there.
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        mine = mapped(given, torch.clone)
        return _Recorded(self._tensors(mine), self._recorder.record(lambda: self._work(mine)))

    def _tensors(self, given: Any) -> list[Tensor]:
        """What a recorded step reads: not timesteps, which stay on the CPU and go to a device as levels."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            if tensor.device == self._parameters[0].device:
                found.append(tensor)
            return tensor

        mapped(given, collect)
        return found


class CudaRecorder:
    """Records on a stream of its own, in memory that all graphs share: they run one after the other."""

    def __init__(self, runner: BlockRunner, device: torch.device) -> None:
        self._runner, self._stream = runner, torch.cuda.Stream(device)
        self._pool: Any = None

    def record(self, work: Callable[[], Any]) -> Replay:
        self.release_cache()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        runner = self._runner
        runner.rewind()
        # Other threads save checkpoints and pin memory meanwhile.
        with (
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            runner.recorded() as replayed,
        ):
            result = mapped(work(), Tensor.detach)

        def replay() -> Any:
            runner.rewind()
            graph.replay()
            replayed()
            # The next replay writes to the same addresses.
            return mapped(result, torch.clone)

        return replay

    def release(self) -> None:
        # A pool that was once given back cannot be recorded into again.
        self._pool = None
        self.release_cache()

    @staticmethod
    def release_cache() -> None:
        # Tensors in reference cycles would keep memory that the recording needs.
        gc.collect()
        torch.cuda.empty_cache()


def signature(value: Any) -> Hashable:
    """What must be equal for a recording to serve: structure, plain values, and shapes and types of tensors."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(signature(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, dict):
        items: dict[str, Any] = value
        return tuple((name, signature(item)) for name, item in items.items())
    return value
