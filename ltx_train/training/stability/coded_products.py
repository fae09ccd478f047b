"""Which layers of a run with 8-bit products multiply their dequantized weights: those whose 8-bit products are too far
off in the run's first pass.

Owns the bound, the measurement and the choice. The choice is part of a checkpoint's notes, so a continued run computes
as it began. A layer has the same choice in all blocks, which share one compiled graph. Only the codes of inputs are
measured, not those of gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltx_train.contracts import StepResult
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.objective import MicroBatch
from ltx_train.distributed.ranks import Ranks
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model.quantized import CodedLinear
from ltx_train.model.transformer import Block, Pair, Transformer

# Share of the outputs' spread. Codes of normally distributed inputs are off by 0.01 (int8) and 0.03 (float8).
MOST = 0.1


class ProductChoice:
    """report: called once, on the leading rank, with a line about a new choice."""

    def __init__(self, transformer: Transformer, ranks: Ranks, report: Callable[[str], None]) -> None:
        self._transformer, self._ranks, self._report = transformer, ranks, report
        self._dense: tuple[str, ...] | None = None

    def before(self, backward: Callable[[MicroBatch], StepResult]) -> Callable[[MicroBatch], StepResult]:
        """`backward`; before its first call in a new run, the layers are measured on that call's inputs. Collective."""

        def call(micro_batch: MicroBatch) -> StepResult:
            if self._dense is None:
                self._choose(micro_batch.inputs)
            return backward(micro_batch)

        return call

    def state(self) -> list[str] | None:
        """Names of the layers within a block that multiply dequantized weights; None before the first pass."""
        return None if self._dense is None else list(self._dense)

    def restore(self, dense: Sequence[str] | None) -> None:
        if dense is not None:
            self._dense = tuple(dense)
            dequantize(self._transformer, dense)

    def _choose(self, inputs: ModelInputs) -> None:
        errors = worst(self._ranks.gather(measure(self._transformer, inputs)))
        self.restore([name for name, error in errors.items() if not error <= MOST])
        if self._ranks.leads and errors:
            self._report(_line(errors, self._dense or ()))


def measure(transformer: Transformer, inputs: ModelInputs) -> dict[str, float]:
    """The largest error of each layer over all blocks, by its name within a block. One forward pass, not compiled.

    Call it before a choice: all layers multiply 8-bit codes afterwards.
    """
    runner = transformer.run_block
    assert isinstance(runner, BlockRunner)
    errors: dict[str, list[Tensor]] = defaultdict(list)

    def probe(_index: int, block: Block, *arguments: Any, **flags: bool) -> Pair:
        with _watched(block, errors):
            return Block.forward(block, *arguments, **flags)

    with torch.no_grad(), runner.probed(probe):
        transformer(inputs.video, inputs.audio)
    return {name: float(torch.stack(found).max()) for name, found in errors.items()}


def worst(of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest error of each layer over all ranks; a nan counts as the largest."""
    names = sorted({name for found in of_ranks for name in found})
    return {
        name: float(torch.tensor([found[name] for found in of_ranks if name in found]).max()) for name in names
    }  # fmt: skip


def dequantize(transformer: Transformer, names: Sequence[str]) -> None:
    """These layers multiply dequantized weights in all blocks, and the others 8-bit codes."""
    for block in transformer.transformer_blocks:
        for name, layer in coded_layers(block):
            layer.dequantizes = name in names


def coded_layers(block: nn.Module) -> Iterator[tuple[str, CodedLinear]]:
    """Layers with 8-bit products and their names, those of the checkpoint file: without an adapter's part."""
    for name, layer in block.named_modules():
        if isinstance(layer, CodedLinear):
            yield name.removesuffix(".base_layer"), layer


@contextmanager
def _watched(block: Block, errors: dict[str, list[Tensor]]) -> Generator[None]:
    """Within the context, each call of a layer adds the error of its 8-bit product, and returns the product of its
    dequantized weight: without compilation, codes of all tokens would take several times the memory of the tokens."""

    def add(name: str, layer: CodedLinear, arguments: tuple[Tensor]) -> None:
        errors[name].append(layer.error(arguments[0]))

    layers = list(coded_layers(block))
    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers]
    try:
        for _, layer in layers:
            layer.dequantizes = True
        yield
    finally:
        for handle, (_, layer) in zip(handles, layers, strict=True):
            handle.remove()
            layer.dequantizes = False


def _line(errors: Mapping[str, float], dense: Sequence[str]) -> str:
    name = max(errors, key=lambda key: errors[key])
    found = f"8-bit products: off by at most {100 * errors[name]:.1f} % of the outputs' spread ({name})"
    if not dense:
        return found
    return f"{found}. Over {100 * MOST:.0f} %, and multiplied with dequantized weights: {', '.join(dense)}"
