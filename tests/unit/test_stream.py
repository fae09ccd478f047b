"""Streaming on the CPU: the same ring, markers and windows as on a GPU, without events."""

from __future__ import annotations

import shutil

import pytest
import torch

from ltx_train.memory.quantize import block_quantizer
from ltx_train.memory.recompute import BlockRunner, Keep, spread
from ltx_train.memory.stream import WeightStream
from ltx_train.model import adapter, load_transformer
from ltx_train.model.transformer import Transformer
from tests.conftest import TINY
from tests.golden.support import losses, modality, read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CASE = "transformer_c_audio_ref_negative"
LORA = adapter.Lora(4, 4, 0.0, ("to_q", "audio_ff.net.2"))


def model(
    streamed: list[int], slots: int, keep: Keep, quantize: str = "none"
) -> tuple[Transformer, WeightStream | None]:
    stream = WeightStream(streamed, slots, torch.device("cpu")) if streamed else None
    made = load_transformer(
        TINY, quantize=block_quantizer(quantize), arrived=stream.stash_if_streamed if stream else None
    )
    if stream is not None:
        stream.ready()
    adapter.attach(made, LORA, 0)
    with torch.no_grad():
        for parameter in adapter.lora_parameters(made).values():
            parameter.add_(0.01)
    made.run_block = BlockRunner([keep] * 3, compiled=False, stream=stream)
    return made, stream


def gradients(made: Transformer) -> list[torch.Tensor]:
    case = read(CASE)
    for parameter in adapter.lora_parameters(made).values():
        parameter.grad = None
    video, audio = made(modality(case, "video"), modality(case, "audio"))
    assert video is not None
    assert audio is not None
    first, second = losses(case, video, audio)
    (first + second).mean().backward()
    found = [p.grad for p in adapter.lora_parameters(made).values()]
    return [g.clone() for g in found if g is not None]


@pytest.mark.parametrize(("streamed", "slots"), [([0, 1, 2], 2), ([0, 2], 2), ([1], 3)])
def test_streamed_gradients_are_bitwise_those_of_resident_weights(streamed: list[int], slots: int) -> None:
    """Over several passes with validation between them, which leaves the ring in another phase."""
    resident, _ = model([], 0, Keep.inputs)
    made, stream = model(streamed, slots, Keep.inputs)
    assert stream is not None
    case = read(CASE)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(resident), gradients(made), strict=True))
        with torch.no_grad():
            pairs = zip(
                resident(modality(case, "video"), modality(case, "audio")),
                made(modality(case, "video"), modality(case, "audio")),
                strict=True,
            )
        for ours, theirs in pairs:
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)
        stream.verify()


def test_int8_weights_stream_and_video_alone_does_too() -> None:
    resident, _ = model([], 0, Keep.inputs, "int8")
    made, _ = model([0, 1, 2], 2, Keep.inputs, "int8")
    assert all(torch.equal(a, b) for a, b in zip(gradients(resident), gradients(made), strict=True))
    case = modality(read("transformer_g_video_only"), "video")
    first, second = (m(case, None)[0] for m in (resident, made))
    assert torch.equal(first, second)
    second.square().mean().backward()


def test_norm_ratio_knows_the_weights_that_are_elsewhere() -> None:
    resident, _ = model([], 0, Keep.inputs)
    made, _ = model([0, 1, 2], 2, Keep.inputs)
    assert adapter.norm_ratio(made) == pytest.approx(adapter.norm_ratio(resident), rel=1e-6)


def test_a_wrong_copy_is_found() -> None:
    _, stream = model([0, 1, 2], 2, Keep.inputs)
    assert stream is not None
    stream._slots[0].memory[5] += 1
    with pytest.raises(RuntimeError, match="differ from their master"):
        stream.verify()


def test_windows_follow_forward_and_backward() -> None:
    stream = WeightStream([0, 2, 4, 6], 3, torch.device("cpu"))
    assert stream._window(0, backward=False, training=True) == [0, 2, 4]
    assert stream._window(2, backward=False, training=True) == [4, 6, 2]
    assert stream._window(3, backward=False, training=True) == [6, 4, 2]
    assert stream._window(3, backward=False, training=False) == [6, 0, 2]
    assert stream._window(1, backward=True, training=True) == [2, 0, 4]
    assert spread(4, 8) == [1, 3, 5, 7]
    assert spread(0, 8) == []
    assert spread(8, 8) == list(range(8))


def test_a_block_that_never_came_is_an_error() -> None:
    with pytest.raises(ValueError, match="never stashed"):
        WeightStream([0], 2, torch.device("cpu")).ready()


def test_keeping_everything_needs_the_weights_to_stay() -> None:
    """A streamed block that keeps everything would find other weights in its slot in backward."""
    from ltx_train import config
    from ltx_train.contracts import ConfigError

    with pytest.raises(ConfigError, match="streamed"):
        config.compose_config(["memory=none", "memory.stream_blocks=2"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_blocks_give_the_same_gradients() -> None:
    """One graph serves all blocks: compiled once on the CPU, no recompilation for the second and third block."""
    import torch._dynamo

    torch._dynamo.reset()
    resident, _ = model([], 0, Keep.inputs)
    made, _ = model([], 0, Keep.inputs)
    made.run_block = BlockRunner([Keep.inputs] * 3, compiled=True)
    expected = gradients(resident)
    for found, wanted in zip(gradients(made), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    gradients(made)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert before <= 2
