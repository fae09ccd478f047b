"""8-bit products that are too far off: measured in a run's first pass, and replaced layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ltx_train.contracts import StepResult
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.objective import MicroBatch
from ltx_train.distributed.ranks import ALONE
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.memory.weights.quantize import block_quantizer, coded_layer
from ltx_train.model import byte_products, load_transformer
from ltx_train.model.quantized import CodedLinear
from ltx_train.model.transformer import Transformer
from ltx_train.training.stability import coded_products
from ltx_train.training.stability.coded_products import ProductChoice
from tests.conftest import TINY
from tests.golden.support import modality, read

CODES = {"int8": torch.int8, "float8": byte_products.FLOAT8}
KINDS = ("int8", "float8", "int8, not rotated")
CASE = "transformer_c_audio_ref_negative"


def layer(kind: str) -> CodedLinear:
    """A layer with 512 input channels. The weights of the first channel are zero."""
    plain = nn.Linear(512, 64)
    nn.init.normal_(plain.weight)
    nn.init.zeros_(plain.weight[:, 0])
    if kind in CODES:
        made = coded_layer(plain, CODES[kind])
        assert made is not None
        return made
    return CodedLinear(*byte_products.row_codes(plain.weight.detach(), torch.int8), None)


def inputs(kind: str) -> torch.Tensor:
    x = torch.randn(3, 400, 512)
    if kind == "one channel":
        x[..., 0] *= 300
    if kind == "common part":
        x += 300 * torch.randn(512)
    return x


@pytest.mark.parametrize(
    ("kind", "data", "least", "most"),
    [
        ("int8", "even", 0.004, 0.015), ("float8", "even", 0.015, 0.04), ("int8, not rotated", "even", 0.004, 0.015),
        ("int8", "one channel", 0.02, 0.4), ("float8", "one channel", 0.015, 0.04),
        ("int8, not rotated", "one channel", 0.4, 2.0),
        ("int8", "common part", 1.0, 10.0), ("float8", "common part", 1.0, 20.0),
    ],
)  # fmt: skip
def test_the_error_of_codes(kind: str, data: str, least: float, most: float) -> None:
    """The bounds are those of normally distributed inputs and weights, apart by more than what draws differ by."""
    torch.manual_seed(3)
    assert least < float(layer(kind).error(inputs(data))) < most


def test_equal_tokens_and_zeros_have_an_error_too() -> None:
    made = layer("int8")
    assert torch.isfinite(made.error(torch.ones(1, 1, 512)))
    assert float(made.error(torch.zeros(2, 5, 512))) == 0
    assert torch.isnan(made.error(torch.full((1, 2, 512), float("nan"))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantized_product_is_that_of_its_dense_weight(kind: str) -> None:
    made = layer(kind)
    made.dequantizes = True
    x = inputs("even").requires_grad_()
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.dense(x.dtype), made.bias), atol=1e-4, rtol=1e-4)
    weights = torch.randn(3, 400, 64)
    (found,) = torch.autograd.grad((made(x) * weights).sum(), x)
    (wanted,) = torch.autograd.grad((nn.functional.linear(x, made.dense(x.dtype)) * weights).sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_no_dequantized_weight_is_kept_for_backward() -> None:
    made = layer("int8")
    made.dequantizes = True
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(inputs("even").requires_grad_()).sum()
    of_the_weight = [tensor for tensor in kept if tensor.shape in (made.weight.shape, made.weight.t().shape)]
    assert of_the_weight
    assert all(tensor.dtype == torch.int8 for tensor in of_the_weight)


def opened(compute: str) -> tuple[Transformer, ModelInputs]:
    model = load_transformer(TINY, quantize=block_quantizer("int8", compute))
    model.run_block = BlockRunner([Keep.everything] * len(model.transformer_blocks), compiled=False)
    case = read(CASE)
    return model, ModelInputs(modality(case, "video"), modality(case, "audio"), None, None)


def outputs(model: Transformer, given: ModelInputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return [velocity for velocity in model(given.video, given.audio) if velocity is not None]


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_measuring_changes_nothing_and_finds_every_layer(compute: str) -> None:
    model, given = opened(compute)
    before = outputs(model, given)
    errors = coded_products.measure(model, given)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, given), before, strict=True))
    assert errors.keys() == {name for name, _ in coded_products.coded_layers(model.transformer_blocks[0])}
    assert 0 < min(errors.values()) <= max(errors.values()) < coded_products.MOST


def _first_pass(model: Transformer, given: ModelInputs) -> tuple[ProductChoice, list[str]]:
    lines: list[str] = []
    choice = ProductChoice(model, ALONE, lines.append)
    calls: list[MicroBatch] = []

    def backward(micro_batch: MicroBatch) -> StepResult:
        calls.append(micro_batch)
        return StepResult(torch.zeros(()), None, None, torch.zeros(1))

    before = choice.before(backward)
    for _ in range(2):
        before(MicroBatch(given, weights=None))  # pyright: ignore[reportArgumentType]
    assert len(calls) == 2
    assert len(lines) == 1, "measured once"
    return choice, lines


def test_layers_that_cannot_bear_8_bits_are_found_and_replaced() -> None:
    """One block's self-attention reads a channel that is large in every token."""
    model, given = opened("int8")
    choice, lines = _first_pass(model, given)
    assert choice.state() == []
    assert "off by at most" in lines[0]
    table: Any = model.transformer_blocks[1].scale_shift_table
    with torch.no_grad():
        table[0, 0] += 1e4
    coded = outputs(model, given)
    choice, lines = _first_pass(model, given)
    found = choice.state()
    assert found is not None
    assert {"attn1.to_q", "attn1.to_k", "attn1.to_v"} <= set(found)
    assert not any(name.startswith("audio_ff") for name in found)
    assert "attn1.to_q" in lines[0]
    for block in model.transformer_blocks:
        assert {name for name, layer in coded_products.coded_layers(block) if layer.dequantizes} == set(found)
    again, _ = opened("int8")
    with torch.no_grad():
        again.transformer_blocks[1].scale_shift_table[0, 0] += 1e4  # pyright: ignore[reportIndexIssue]
    restored = ProductChoice(again, ALONE, lines.append)
    restored.restore(found)
    chosen = outputs(model, given)
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, given), chosen, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(coded, chosen, strict=True))


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ([{"a": 0.1, "b": 0.3}, {"a": 0.2}], {"a": 0.2, "b": 0.3}), ([{}, {}], {}),
        ([{"a": 0.1}, {"a": float("nan")}], {"a": float("nan")}),
    ],
)  # fmt: skip
def test_the_worst_of_all_ranks_counts(of_ranks: Sequence[dict[str, float]], expected: dict[str, float]) -> None:
    assert coded_products.worst(of_ranks) == pytest.approx(expected, nan_ok=True)
