"""Quantized layers: quanto's numbers, and products in float8 against exact ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.nn import functional

from ltx_train.memory.weights import quantize
from ltx_train.memory.weights.quantize import block_quantizer
from ltx_train.model import byte_products, load_transformer
from ltx_train.model.linear import dense_weight
from ltx_train.model.quantized import ByteLinear, CodedLinear, NibbleLinear, QuantizedLinear
from tests.conftest import TINY
from tests.golden.support import modality, read, relative_rms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 64), (64, 256), (96, 64)])
@pytest.mark.parametrize(("name", "kind"), [("int8", "qint8"), ("float8", "qfloat8"), ("int4", "qint4")])
def test_weights_are_those_that_quanto_makes(
    name: str, kind: str, inputs: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum import quanto
    from optimum.quanto.library.extensions import cpp

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    # Otherwise quanto compiles the same in C++, half a minute in a fresh environment.
    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
    layer = nn.Linear(inputs, outputs).to(dtype)
    theirs: Any = nn.Sequential(nn.Linear(inputs, outputs).to(dtype))
    theirs[0].load_state_dict(layer.state_dict())
    quanto.quantize(theirs, weights=getattr(quanto, kind))
    quanto.freeze(theirs)
    weight = theirs[0].weight
    weight = weight.weight_qbits_tensor() if type(weight).__name__.startswith("Tiny") else weight
    quantizer = quantize.QUANTIZERS[name]
    assert quantizer is not None
    ours = quantizer(layer)
    assert ours is not None
    dequantized = weight.dequantize()
    assert torch.equal(ours.dense(dtype), dequantized)
    x = torch.randn(2, 3, inputs, dtype=dtype)
    assert torch.equal(ours(x), nn.functional.linear(x, dequantized, layer.bias))
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize(
    ("weights", "compute", "kinds", "error"),
    [
        ("int8", "bf16", {ByteLinear: 84}, 5e-2),
        ("float8", "bf16", {ByteLinear: 84}, 1e-1),
        ("int4", "bf16", {NibbleLinear: 84}, 5e-1),
        ("none", "fp8", {CodedLinear: 42}, 1e-1),
        ("float8", "fp8", {CodedLinear: 42, ByteLinear: 42}, 1e-1),
        ("none", "int8", {CodedLinear: 42}, 5e-2),
        ("int8", "int8", {CodedLinear: 42, ByteLinear: 42}, 5e-2),
    ],
)
def test_blocks_alone_are_quantized_and_close(
    weights: str, compute: str, kinds: dict[type[nn.Module], int], error: float
) -> None:
    case = read("transformer_c_audio_ref_negative")
    model = load_transformer(TINY, quantize=block_quantizer(weights, compute))
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {kind: sum(type(m) is kind for m in found.values()) for kind in kinds} == kinds
    assert len(found) == sum(kinds.values())
    assert all(n.startswith("transformer_blocks.") and "gate" not in n for n in found)
    with torch.no_grad():
        pair = model(modality(case, "video"), modality(case, "audio"))
    for velocity, name in zip(pair, ("video", "audio"), strict=True):
        assert velocity is not None
        assert 1e-6 < relative_rms(velocity, case[f"out.{name}_velocity"]) < error


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("compiled", [False, True])
def test_8_bit_products_and_their_input_gradients(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    coded = quantize.coded_layer(plain, dtype)
    assert coded is not None
    layer: Any = torch.compile(coded, fullgraph=True, backend="aot_eager") if compiled else coded
    x = torch.randn(2, 5, 128, requires_grad=True)
    exact = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 5, 64)
    y, wanted = layer(x), plain(exact)
    y.backward(upstream)
    wanted.backward(upstream)
    assert relative_rms(y.detach(), wanted.detach()) < 5e-2
    assert x.grad is not None
    assert exact.grad is not None
    assert relative_rms(x.grad, exact.grad) < 6e-2
    # The rows of a token that is a thousand times smaller lose nothing: every row has its own scale.
    scales = torch.logspace(-4, 2, 5)[None, :, None]
    with torch.no_grad():
        rows = (layer(x * scales) - plain.bias) / scales
        assert relative_rms(rows, plain(x) - plain.bias) < 6e-2
    assert relative_rms(dense_weight(coded), plain.weight.detach()) < 4e-2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_reach_the_kernel_row_by_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of attention may come column by column; kernels read rows."""
    seen: list[bool] = []
    name = "_int_mm" if dtype == torch.int8 else "_scaled_mm"
    true = getattr(torch, name)

    def watched(a: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        seen.append(a.is_contiguous())
        return true(a, *given, **more)

    monkeypatch.setattr(torch, name, watched)
    layer = quantize.coded_layer(nn.Linear(32, 48), dtype)
    assert layer is not None
    x = torch.randn(6, 32, requires_grad=True)
    upstream = torch.randn(6, 48)
    layer(x).backward(upstream)
    expected, x.grad = x.grad, None
    layer(x).backward(upstream.t().contiguous().t())
    assert expected is not None
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    assert seen == [True] * 4


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_a_rotation_is_orthogonal_and_exact(group: int) -> None:
    x = torch.randint(-8, 8, (3, 2 * group)).to(torch.bfloat16)
    twice = byte_products.rotated(byte_products.rotated(x.float(), group), group)
    assert torch.equal(twice, group * x.float())
    assert torch.linalg.vector_norm(byte_products.rotated(x.float(), group)) == pytest.approx(
        group**0.5 * float(torch.linalg.vector_norm(x.float())), rel=1e-6
    )


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.05), ("fp8", 0.12)])
def test_an_outlier_costs_the_other_channels_little(kind: str, bound: float) -> None:
    """One channel is a hundred times larger. The error is compared with what the other channels contribute; plain int8
    codes would lose a fifth of that."""
    torch.manual_seed(0)
    plain = nn.Linear(1024, 256, bias=False)
    x = torch.randn(64, 1024)
    x[:, 7] *= 100
    others = x.clone()
    others[:, 7] = 0
    layer = quantize.coded_layer(plain, quantize.CODES[kind])
    assert layer is not None
    with torch.no_grad():
        error = torch.linalg.vector_norm(layer(x) - plain(x)) / torch.linalg.vector_norm(plain(others))
        unrotated = CodedLinear(*byte_products.row_codes(plain.weight, torch.int8), None)
        lost = torch.linalg.vector_norm(unrotated(x) - plain(x)) / torch.linalg.vector_norm(plain(others))
    assert error < bound
    assert lost > 0.2
    assert relative_rms(dense_weight(layer), plain.weight.detach()) < 4e-2


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "fp8", "int8"])
def test_a_weight_row_of_zeros_stays_one(kind: str) -> None:
    plain = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        plain.weight[3] = 0
    layer = quantize._bytes(plain, kind) if kind.startswith("q") else quantize.coded_layer(plain, quantize.CODES[kind])
    assert layer is not None
    output = layer(torch.randn(2, 32))
    assert bool(torch.isfinite(output).all())
    assert bool((output[:, 3] == 0).all())
    assert bool(torch.isfinite(layer(torch.zeros(2, 32))).all())


def test_the_compiler_makes_the_codes_of_an_input_once() -> None:
    """Three layers that read the same tokens, as to_q, to_k and to_v do."""
    layers = [quantize.coded_layer(nn.Linear(32, 32), torch.int8) for _ in range(3)]
    graphs: list[torch.fx.GraphModule] = []

    def remembered(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=remembered, partition_fn=min_cut_rematerialization_partition)
    call = torch.compile(lambda x: [layer(x) for layer in layers if layer is not None], backend=backend)
    sum(y.sum() for y in call(torch.randn(4, 32, requires_grad=True))).backward()
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("byte_product" in t for t in targets) == 3
    assert sum("amax" in t for t in targets) == 1


@pytest.mark.parametrize("dtype", [torch.int8, byte_products.FLOAT8])
def test_codes_of_bfloat16_values_are_those_of_float32_ones(dtype: torch.dtype) -> None:
    x, columns = torch.randn(8, 64).bfloat16(), torch.rand(1, 64) + 0.1
    for found, expected in (
        (byte_products.row_codes(x, dtype), byte_products.row_codes(x.float(), dtype)),
        (byte_products.row_codes(x, dtype, columns), byte_products.row_codes(x.float() * columns, dtype)),
    ):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_the_compiler_stores_what_codes_are_made_of_in_its_own_dtype() -> None:
    """Magnitudes and codes read one bfloat16 matrix, in both passes: a float32 one would be twice as large."""
    first, second = (quantize.coded_layer(nn.Linear(32, 32).bfloat16(), byte_products.FLOAT8) for _ in range(2))
    assert first is not None
    assert second is not None
    graphs: list[torch.fx.GraphModule] = []

    def remembered(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(joint_graph_passes(graph))
        return make_boxed_func(graph.forward)

    call = torch.compile(
        lambda x: second(functional.gelu(first(x), approximate="tanh")), backend=aot_autograd(fw_compiler=remembered)
    )
    call(torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)).float().sum().backward()
    read = [node.args[0] for graph in graphs for node in graph.graph.nodes if "abs" in str(node.target)]
    assert len(read) == 4
    assert all(value.meta["val"].dtype == torch.bfloat16 for value in read)
    users = [{str(user.target) for user in value.users} for value in read]
    assert all(len(names) == 2 for names in users)
    assert not any("convert_element_type" in name for names in users for name in names)


def test_tiles_and_pairs_that_do_not_fit_stay_as_they_are() -> None:
    assert quantize.coded_layer(nn.Linear(24, 64), torch.int8) is None
    assert quantize._int4(nn.Linear(64, 33)) is None
    assert quantize._group_size(4096) == 128
    assert quantize._group_size(96) == 96
    assert quantize._group_size(50) == 50
