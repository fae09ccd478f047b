"""Streaming on the CPU: the same ring, markers and windows as on a GPU, without events."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_train.contracts import Modality
from ltx_train.distributed.exchange import single_process
from ltx_train.memory.activations.input_offload import InputOffload
from ltx_train.memory.blocks import runner
from ltx_train.memory.blocks.compile import graphs
from ltx_train.memory.blocks.keep import Keep, evenly_spaced
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.memory.weights.quantize import block_quantizer
from ltx_train.memory.weights.stores import ALIGNMENT, HostStore, PeerStore, _checksum
from ltx_train.memory.weights.stream import WeightStream
from ltx_train.model import adapter, load_transformer
from ltx_train.model.transformer import Transformer
from tests.conftest import TINY
from tests.golden.support import losses, modality, read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CPU = torch.device("cpu")
CASE = "transformer_c_audio_ref_negative"
TRACED = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
LORA = adapter.Lora(rank=4, alpha=4, dropout=0.0, targets=("to_q", "audio_ff.net.2"))


def model(
    streamed: list[int],
    slots: int,
    keep: Keep,
    quantize: str = "none",
    offloaded: tuple[int, ...] = (),
    compiled: bool = False,
    lora: adapter.Lora = LORA,
) -> tuple[Transformer, WeightStream | None]:
    stream = WeightStream(streamed, slots, CPU, HostStore(CPU)) if streamed else None
    offload = InputOffload(offloaded, torch.device("cpu")) if offloaded else None
    made = load_transformer(
        TINY, quantize=block_quantizer(quantize), arrived=stream.stash_if_streamed if stream else None
    )
    if stream is not None:
        stream.allocate_ring()
    adapter.attach(made, lora, 0)
    with torch.no_grad():
        for parameter in adapter.lora_parameters(made).values():
            parameter.add_(0.01)
    made.run_block = BlockRunner([keep] * 3, compiled=compiled, stream=stream, offload=offload)
    return made, stream


def masked(case: dict[str, torch.Tensor]) -> Modality:
    """The audio with a reference of half strength, hidden from the video, which reads no text."""
    audio = modality(case, "audio")
    assert audio is not None
    shown = torch.ones(audio.latent.shape[:2])
    shown[:, case["audio.target"].shape[1] :] = 0
    return replace(audio, attention_mask=(1 + shown) / 2, cross_mask=shown, reads_text=shown)


def gradients(
    made: Transformer, name: str = CASE, masks: bool = False, video_alone: bool = False
) -> list[torch.Tensor]:  # fmt: skip
    case = read(name)
    for parameter in adapter.lora_parameters(made).values():
        parameter.grad = None
    if video_alone:
        velocity, _ = made(modality(case, "video"), None)
        assert velocity is not None
        velocity.square().mean().backward()
        return [p.grad.clone() for p in adapter.lora_parameters(made).values() if p.grad is not None]
    video, audio = made(modality(case, "video"), masked(case) if masks else modality(case, "audio"))
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


def test_norm_ratio_of_streamed_weights_equals_that_of_resident_ones() -> None:
    resident, _ = model([], 0, Keep.inputs)
    made, _ = model([0, 1, 2], 2, Keep.inputs)
    assert adapter.norm_ratios(made)[""] == pytest.approx(adapter.norm_ratios(resident)[""], rel=1e-6)


def test_a_wrong_copy_is_found() -> None:
    _, stream = model([0, 1, 2], 2, Keep.inputs)
    assert stream is not None
    stream._slots[0].memory[5] += 1
    with pytest.raises(RuntimeError, match="differ from their master"):
        stream.verify()


def test_windows_follow_forward_and_backward() -> None:
    stream = WeightStream([0, 2, 4, 6], 3, CPU, HostStore(CPU))
    assert stream._window(0, backward=False, training=True) == [0, 2, 4]
    assert stream._window(2, backward=False, training=True) == [4, 6, 2]
    assert stream._window(3, backward=False, training=True) == [6, 4, 2]
    assert stream._window(3, backward=False, training=False) == [6, 0, 2]
    assert stream._window(1, backward=True, training=True) == [2, 0, 4]
    assert evenly_spaced(4, 8) == [1, 3, 5, 7]
    assert evenly_spaced(0, 8) == []
    assert evenly_spaced(8, 8) == list(range(8))


def test_a_block_that_never_came_is_an_error() -> None:
    with pytest.raises(ValueError, match="never stashed"):
        WeightStream([0], 2, CPU, HostStore(CPU)).allocate_ring()


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_streamed_block_gives_equal_gradients_for_every_way_of_keeping(keep: Keep, quantize: str) -> None:
    """What is saved for backward are the parameters themselves, which the stream fills again before it."""
    resident, _ = model([], 0, keep, quantize)
    made, _ = model([0, 1, 2], 2, keep, quantize)
    assert all(torch.equal(a, b) for a, b in zip(gradients(resident), gradients(made), strict=True))


@pytest.mark.parametrize("offloaded", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("streamed", [[], [0, 1, 2]])
def test_inputs_that_waited_on_the_host_change_no_gradient(offloaded: tuple[int, ...], streamed: list[int]) -> None:
    plain, _ = model([], 0, Keep.inputs)
    made, _ = model(streamed, 2, Keep.inputs, offloaded=offloaded)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(made), strict=True))


def test_storage_is_empty_while_its_content_is_away() -> None:
    offload = InputOffload([0], torch.device("cpu"))
    hidden = torch.arange(6.0).view(2, 3)
    offload.send(0, [hidden])
    assert hidden.untyped_storage().nbytes() == 0
    offload.fetch(0)
    assert torch.equal(hidden, torch.arange(6.0).view(2, 3))


class _Attentions(TorchDispatchMode):
    """Numbers of queries and keys of the attentions that are computed within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in runner._ATTENTION:
            self.found.append((args[0].shape[-2], args[1].shape[-2]))
        return func(*args, **(kwargs or {}))


def test_only_self_attention_is_kept_and_not_computed_again() -> None:
    case = read(CASE)
    made, _ = model([], 0, Keep.attention)
    video, audio = made(modality(case, "video"), modality(case, "audio"))
    assert video is not None
    assert audio is not None
    with _Attentions() as again:
        (video.square().mean() + audio.square().mean()).backward()
    computed = [queries == keys for queries, keys in again.found]
    assert len(computed) == 3 * 4  # in three blocks: two attentions to the text and two between the modalities
    assert not any(computed)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("keep", "quantize"), [(Keep.inputs, "none"), (Keep.attention, "int8")])
def test_compiled_blocks_give_the_same_gradients(keep: Keep, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves all blocks, streamed or offloaded: nothing is compiled for the second and third block.

    With DoRA and every kind of mask in one variant, as far as the compiler's own kernels, which take minutes to build;
    with neither, and those kernels for the video alone, in the other.
    """
    torch._dynamo.reset()
    before = graphs()
    richer = quantize == "none"
    if not richer and " " in torch.__file__:
        pytest.skip("torch passes its own folder to g++ unquoted")
    if richer:
        monkeypatch.setattr(runner, "compiled_call", TRACED)
    lora = replace(LORA, dora=richer)
    found_in = partial(gradients, masks=richer, video_alone=not richer)
    expected = found_in(model([], 0, keep, quantize, lora=lora)[0])
    resident, _ = model([], 0, keep, quantize, compiled=True, lora=lora)
    alone = found_in(resident)
    assert len(alone) > 0
    for found, wanted in zip(alone, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    assert graphs() == before + 1
    made, stream = model([0, 1, 2], 2, keep, quantize, offloaded=(0, 1, 2), compiled=True, lora=lora)
    # The same compiled function: a second wrapper of it would compile again.
    one, other = resident.run_block, made.run_block
    assert isinstance(one, BlockRunner)
    assert isinstance(other, BlockRunner)
    other._calls = one._calls
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found_in(made), alone, strict=True))
    assert graphs() == before + 1
    assert stream is not None
    stream.verify()
    if not richer:
        # Where a restarted process finds them again.
        cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert cache.parts[-2:] == ("ltx-train", "compiled")
        assert any(cache.rglob("*.so"))
        torch._dynamo.reset()
        hits, bypassed = (counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "bypass"))
        assert all(torch.equal(a, b) for a, b in zip(found_in(resident), alone, strict=True))
        assert counters["aot_autograd"]["autograd_cache_hit"] > hits
        assert counters["aot_autograd"]["autograd_cache_bypass"] == bypassed


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_is_compiled_once_every_bucket_has_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the compiler's own kernels, which take a minute to build."""
    monkeypatch.setattr(runner, "compiled_call", TRACED)
    torch._dynamo.reset()
    made, _ = model([], 0, Keep.inputs, compiled=True)
    adapter.DropoutKeys(made).set([1])
    before = graphs()
    for name in (CASE, "transformer_d_video_ref"):
        gradients(made, name)
    seen = graphs()
    assert seen == before + 2
    for name in (CASE, "transformer_d_video_ref", CASE):
        gradients(made, name)
    assert graphs() == seen


@pytest.mark.parametrize("size", [1, 255, 256, 1000, 4096])
def test_slices_of_all_ranks_are_the_block_and_no_rank_keeps_more(size: int) -> None:
    """Three ranks in one process; the all-gather puts their slices one behind the other."""
    block = torch.randint(1, 255, (size,), dtype=torch.uint8)
    slices: list[torch.Tensor] = []

    def all_gather(whole: torch.Tensor, _own: torch.Tensor) -> None:
        whole.copy_(torch.cat(slices))

    alone = single_process()
    stores = [
        PeerStore(replace(alone, rank=r, world=3, all_gather=all_gather, gather_objects=lambda v: [v] * 3), CPU)
        for r in range(3)
    ]
    for store in stores:
        buffer = store.allocate(size)
        buffer[:size] = block
        store.put(7, buffer)
        slices.append(store.own_slice(7))
    assert {len(own) for own in slices} == {-(-size // 768) * 256}
    for store in stores:
        target = torch.zeros(store.largest + 5, dtype=torch.uint8)
        store.copy_to(7, target)
        assert torch.equal(target[:size], block)
        assert store.matches(7, target)
        target[size // 2] += 1
        assert not store.matches(7, target)
    slices[0], slices[1] = slices[1], slices[0]
    stores[0].copy_to(7, target)
    assert stores[0].matches(7, target) == torch.equal(slices[0], slices[1])


def test_checking_a_block_takes_little_memory_beside_it() -> None:
    """Summed in another type than its own, torch would first make a copy of eight times the block."""
    block = torch.randint(0, 255, (2**22,), dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = _checksum(block)
    assert max(event.cpu_memory_usage for event in profile.events()) < block.numel() / 2
    block[5], block[ALIGNMENT + 5] = 1, 2
    other = block.clone()
    other[5], other[ALIGNMENT + 5] = 2, 1
    assert len({found, _checksum(block), _checksum(other)}) == 3
