"""`Updates` by DeepSpeed's engine, for full fine-tunes and for adapters.

    full fine-tune:  engine(transformer) -> hooks gather, reduce in backward -> engine.step
    adapter:         transformer -> .grad grow over all passes -> handed over at once -> engine reduces -> engine.step

Checkpoints stay this project's own: `deepspeed_state` reads and fills what the engine holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.distributed.exchange import Exchange
from ltx_train.memory.weights.flat_blocks import FlatBlocks
from ltx_train.updates.deepspeed_state import EngineState
from ltx_train.updates.flat_adapter import FlatAdapter
from ltx_train.updates.protocol import TrainedState
from ltx_train.updates.unit_slices import Place


class EngineUpdates:
    """What full fine-tunes and adapters have in common.

    engine: DeepSpeed's. shapes: of everything that is trained, by name, in the order in which a single process numbers
    it. contents: what lies in each parameter that the engine sees, by its id.
    """

    def __init__(
        self, engine: Any, shapes: Mapping[str, torch.Size], contents: Mapping[int, Sequence[Place]], *, stage: int,
        exchange: Exchange,
    ) -> None:  # fmt: skip
        self.engine, self._zero, self._shapes = engine, engine.optimizer, shapes
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        self._state = EngineState(self._zero, contents, list(shapes), stage=stage, exchange=exchange)

    @property
    def accumulating(self) -> list[nn.Parameter]:
        return []

    def end_pass(self) -> None:
        pass

    def average(self) -> None:
        pass

    def norms(self) -> dict[str, Tensor]:
        return {}

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        """The engine skips a step whose gradient is not finite, and reports an infinite norm for it. It knows no
        `limit`, so the configuration refuses `optim.skip_spikes`."""
        self._zero.clip_grad = clip
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float("inf") if norm is None or self._zero.overflow else norm)

    def sizes(self) -> Mapping[str, int]:
        return {name: shape.numel() for name, shape in self._shapes.items()}

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def awaited(self) -> str:
        return ""


class FullUpdates(EngineUpdates):
    """Every weight is trained; the engine is around the transformer, and its hooks have reduced the gradients when
    backward ends.

    parameters: the trained tensors by name. flat: blocks whose tensors lie in flat parameters (stage 3).
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], *,
        flat: FlatBlocks | None, stage: int, exchange: Exchange,
    ) -> None:  # fmt: skip
        contents = {id(p): [Place(name=name, start=0, shape=shapes[name])] for name, p in parameters.items()}
        for whole, places in ({} if flat is None else flat.contents()).items():
            contents[id(whole)] = [Place(name=p.name, start=p.start, shape=p.shape) for p in places]
        super().__init__(engine, shapes, contents, stage=stage, exchange=exchange)
        self._parameters, self._flat = parameters, flat

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._flat is None else self._gathered(self._flat)

    @contextmanager
    def _gathered(self, flat: FlatBlocks) -> Generator[None]:
        visible = [p for p in self.engine.module.parameters() if p.requires_grad]
        with importlib.import_module("deepspeed").zero.GatheredParameters(visible):
            flat.bind()
            yield
            flat.release()

    def state(self) -> TrainedState:
        return self._state.slices().own()

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        self._state.fill(weights, optimizer)
        if self._flat is not None:
            self._state.publish()
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])


class AdapterUpdates(EngineUpdates):
    """An adapter is trained; the engine is around its flat weights and knows nothing of the passes."""

    def __init__(self, engine: Any, flat: FlatAdapter, *, stage: int, exchange: Exchange) -> None:
        shapes = {name: parameter.shape for name, parameter in flat.parameters_by_name.items()}
        super().__init__(engine, shapes, flat.contents(), stage=stage, exchange=exchange)
        self._flat = flat
        # The engine has moved the flat weights.
        flat.bind()

    @property
    def accumulating(self) -> list[nn.Parameter]:
        return list(self._flat.parameters_by_name.values())

    def average(self) -> None:
        self.engine.backward(self.engine())

    def step(self, clip: float, limit: Tensor | None = None) -> Tensor:
        norm = super().step(clip, limit)
        self._flat.zero_gradients()
        return norm

    def state(self) -> TrainedState:
        return self._state.slices().gathered()

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        self._state.fill(weights, optimizer)
        with torch.no_grad():
            for name, parameter in self._flat.parameters_by_name.items():
                parameter.copy_(weights[name])
