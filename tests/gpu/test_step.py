"""A training step on a GPU: streamed equals resident, nothing waits, budgets hold. Run: make gpu"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ltx_train import config
from ltx_train.assembly import from_config, model_builder, run_builder, timing, update_builder
from ltx_train.assembly.setup import Setup, settled
from ltx_train.diffusion import conditions, transfer
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model import adapter, byte_products
from ltx_train.model.transformer import Transformer
from ltx_train.updates.protocol import Updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
STEPS = 20


def made(*overrides: str) -> Setup:
    return settled(
        config.compose_config(
            [
                "experiment=audio_reference", "model.weights=random", "model.dtype=bfloat16", "strategy.device=cuda",
                "optim.lr=1e-3", "optim.schedule=constant", "optim.warmup=0", "optim.name=adamw", *overrides,
            ]
        )
    )  # fmt: skip


def opened(setup: Setup) -> tuple[Transformer, Updates, timing.Step]:
    """The code that `fit` and `bench` step with."""
    transformer, updates = update_builder.open_for_training(setup)
    return transformer, updates, timing.random_steps(setup, run_builder.step_recipe(setup, transformer, updates))


@pytest.fixture
def deterministic_attention():  # type: ignore[no-untyped-def]
    """The default backward of attention varies between equal runs."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_20_streamed_and_recorded_steps_are_bitwise_those_of_resident_weights(quantize: str, compiled: str) -> None:
    found: list[tuple[list[float], list[torch.Tensor]]] = []
    ways = [(0, False, False), (3, True, False), (0, False, True), (3, False, True), (2, True, True)]
    for streamed, offloaded, graphs in ways:
        setup = made(
            f"memory.quantize={quantize}", "memory.keep=inputs", "memory.keep_everything=0",
            f"memory.stream_blocks={streamed}", "memory.stream_slots=2", f"memory.offload_inputs={offloaded}",
            f"memory.graphs={graphs}", f"memory.compile={compiled}", "adapter.dropout=0.05",
        )  # fmt: skip
        transformer, _, step = opened(setup)
        losses = [float(step(number)) for number in range(STEPS)]
        found.append((losses, [p.detach().clone() for p in adapter.lora_parameters(transformer).values()]))
        runner = transformer.run_block
        assert isinstance(runner, BlockRunner)
        if runner.stream is not None:
            runner.stream.verify()
    for (losses, weights), way in zip(found[1:], ways[1:], strict=True):
        assert losses == found[0][0], way
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0][1], strict=True)), way


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("strategy", ["zero3", "zero2"])
@pytest.mark.parametrize("keep", ["everything", "inputs"])
def test_recorded_steps_of_a_shared_full_fine_tune_are_bitwise_those_that_are_launched(
    strategy: str, keep: str
) -> None:
    found: list[tuple[list[float], list[torch.Tensor]]] = []
    for graphs in (False, True):
        setup = made(
            "adapter=full", "optim=adamw", "memory.quantize=none", f"strategy={strategy}", f"memory.keep={keep}",
            "memory.keep_everything=0", f"memory.graphs={graphs}",
        )  # fmt: skip
        _, updates, step = opened(setup)
        losses = [float(step(number)) for number in range(STEPS)]
        state = updates.state().slice
        assert state is not None
        found.append((losses, [t.clone() for kinds in state.tensors.values() for t in kinds.values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("streamed", [0, 3])
def test_a_step_synchronises_nothing(streamed: int, graphs: bool) -> None:
    setup = made(
        f"memory.stream_blocks={streamed}", "memory.keep=inputs", "memory.keep_everything=0", f"memory.graphs={graphs}"
    )
    step = opened(setup)[2]
    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inputs_that_share_memory_reach_the_device() -> None:
    """Measuring has one noise level for all samples: an expanded tensor."""
    setup = made("optim.batch_size=2")
    mode = setup.config.mode
    batch = timing.random_batch(setup.config, 0)
    drawn = conditions.draw(batch, mode, from_config.sigma_distribution(setup.config), 0)
    level = torch.full((1,), 0.5).expand(2)
    inputs = conditions.assemble(batch, mode, replace(drawn, video_sigma=level, audio_sigma=level))
    arrived = transfer.to_device(inputs, setup.device)
    assert arrived.audio is not None
    assert arrived.audio.sigma.tolist() == [0.5, 0.5]


def test_a_run_is_held_to_its_budget() -> None:
    setup = made("memory.budget_gib=2")
    model_builder.open_frozen(setup)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setup.device)


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_8_bit_products_stay_near_bfloat16(compute: str) -> None:
    curves: list[list[float]] = []
    for kind in ("bf16", compute):
        step = opened(made("memory=auto", f"memory.compute={kind}"))[2]
        curves.append([float(step(number)) for number in range(STEPS)])
    assert curves[0] != curves[1]
    assert all(abs(a / b - 1) < 0.01 for a, b in zip(*curves, strict=True))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(300, 208, 144), (128, 128, 256), (1, 16, 16)])
def test_the_int8_kernel_is_exact_at_edges_of_its_tiles(rows: int, inner: int, columns: int) -> None:
    """Column by column, too, as gradients of attention may come."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((rows, inner), (columns, inner))
    a, b = (torch.randint(-127, 128, size, generator=generator, device="cuda").to(torch.int8) for size in sizes)
    scale, other = (torch.rand(n, 1, generator=generator, device="cuda") for n in (rows, columns))
    exact = (a.double() @ b.double().t()) * scale * other.t()
    for left in (a, a.t().contiguous().t()):
        found = byte_products._multiplied(left, scale, b, other.t(), torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    assert torch.equal(byte_products.transposed(b), b.t().contiguous())
