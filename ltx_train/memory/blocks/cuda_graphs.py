"""Forward and backward of a micro-batch as one CUDA graph per shape, for GPUs that finish kernels sooner than the host
launches them.

Owns capture and replay, and the tensors that a graph reads and writes at fixed addresses. The work itself is an
argument. The first pass of a shape runs without a graph: it compiles and warms up.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ltx_train.diffusion.transfer import map_tensors
from ltx_train.memory.blocks.runner import BlockRunner

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


class Recorder(Protocol):
    """Turns work on fixed tensors into a function that repeats it."""

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Recording:
    """inputs: the tensors at the addresses that the graph reads."""

    inputs: list[Tensor]
    replay: Callable[[], Any]


class StepGraphs(Generic[Inputs, Result]):
    """`graphs(inputs)` does `work(inputs)`, which accumulates into the parameters' gradients. Recorded from a shape's
    second pass on.

    Inputs and result are nested dataclasses of tensors on the device and plain values. Plain values are part of the
    recording. Gradients keep their memory between passes: they are zeroed, not dropped.
    """

    def __init__(
        self, work: Callable[[Inputs], Result], parameters: Sequence[nn.Parameter], recorder: Recorder
    ) -> None:
        self._work, self._parameters, self._recorder = work, list(parameters), recorder
        self._known: set[Hashable] = set()
        self._recordings: dict[Hashable, _Recording] = {}
        self._gradients: list[Tensor] = []

    def __call__(self, inputs: Inputs) -> Result:
        shape = signature(inputs)
        if shape not in self._known:
            self.release()  # a pass without a graph needs the memory that graphs hold
            self._known.add(shape)
            return self._work(inputs)
        if shape not in self._recordings:
            self._recordings[shape] = self._record(inputs)
        # Checked at each pass, for some microseconds of the host: a replay would silently add to freed memory.
        if any(p.grad is not g for p, g in zip(self._parameters, self._gradients, strict=True)):
            raise RuntimeError("a gradient that a recorded step writes to was replaced")
        recording = self._recordings[shape]
        for fixed, tensor in zip(recording.inputs, self._device_tensors(inputs), strict=True):
            fixed.copy_(tensor, non_blocking=True)
        return recording.replay()

    def release(self) -> None:
        """Gives back what the graphs hold; the next pass of a known shape is recorded again."""
        if self._recordings:
            self._recordings.clear()
            self._recorder.release()

    def _record(self, inputs: Inputs) -> _Recording:
        # A recording accumulates at addresses: gradients must exist before it and stay there.
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        fixed = map_tensors(inputs, torch.clone)
        return _Recording(self._device_tensors(fixed), self._recorder.record(lambda: self._work(fixed)))

    def _device_tensors(self, inputs: Inputs) -> list[Tensor]:
        """The tensors that a recording reads. Timesteps stay on the CPU and go to the device as levels."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            if tensor.device == self._parameters[0].device:
                tensors.append(tensor)
            return tensor

        map_tensors(inputs, collect)
        return tensors


class CudaRecorder:
    """Records on a stream of its own, in one memory pool for all graphs: they run one after the other."""

    def __init__(self, runner: BlockRunner, device: torch.device) -> None:
        self._runner, self._stream = runner, torch.cuda.Stream(device)
        self._pool: Any = None

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.release_cache()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        runner = self._runner
        runner.rewind()
        # thread_local: other threads save checkpoints and pin memory meanwhile.
        with (
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            runner.recording() as replayed,
        ):
            result = map_tensors(work(), Tensor.detach)

        def replay() -> Any:
            runner.rewind()
            graph.replay()
            replayed()
            # The next replay writes to the same addresses.
            return map_tensors(result, torch.clone)

        return replay

    def release(self) -> None:
        # A pool that was given back cannot be recorded into again.
        self._pool = None
        self.release_cache()

    @staticmethod
    def release_cache() -> None:
        # Tensors in reference cycles would keep memory that the recording needs.
        gc.collect()
        torch.cuda.empty_cache()


def signature(value: Any) -> Hashable:
    """What must be equal for a recording to be reused: structure, plain values, shapes, dtypes and devices."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(signature(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, dict):
        items: dict[str, Any] = value
        return tuple((name, signature(item)) for name, item in items.items())
    return value
