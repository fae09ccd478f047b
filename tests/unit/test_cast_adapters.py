from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltx_train.memory.blocks.cast_adapters import CastAdapters
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model import adapter, load_transformer
from ltx_train.model.adapter import Lora
from ltx_train.model.linear import LowRankLinear, products
from ltx_train.model.transformer import Transformer
from tests.conftest import TINY
from tests.golden.support import losses, modality, read

CASE = read("transformer_i_gradients")


def adapted(keep: Keep = Keep.everything) -> Transformer:
    model = load_transformer(TINY, dtype=torch.bfloat16).requires_grad_(False)
    adapter.attach(
        model,
        Lora(rank=4, alpha=4.0, dropout=0.0, targets=("attn1.to_q", "attn1.to_k", "attn1.to_v", "audio_ff.net.2")),
        0,
    )
    stream = torch.Generator().manual_seed(1)
    for parameter in adapter.lora_parameters(model).values():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=stream))
    model.run_block = BlockRunner([keep] * 3, compiled=False)
    return model.train()


def trained(model: Transformer, passes: int = 1) -> dict[str, Tensor]:
    for _ in range(passes):
        video, audio = model(modality(CASE, "video"), modality(CASE, "audio"))
        assert video is not None
        assert audio is not None
        first, second = losses(CASE, video.float(), audio.float())
        (first + second).mean().backward()
    return {name: p.grad for name, p in adapter.lora_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("keep", list(Keep))
def test_gradients_are_those_of_matrices_cast_one_by_one(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(adapted(keep))
    assert len(found) == 3 * 8
    monkeypatch.setattr(CastAdapters, "cast", lambda *_: None)
    expected = trained(adapted(keep))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype is torch.float32 and torch.equal(found[name], expected[name]) for name in found)


def test_gradients_add_up_where_they_are() -> None:
    model = adapted()
    first = {name: g.clone() for name, g in trained(model).items()}
    places = {name: p.grad for name, p in adapter.lora_parameters(model).items()}
    twice = trained(model)
    assert all(torch.equal(twice[name], 2 * first[name]) and places[name] is twice[name] for name in twice)
    assert all(layer.cast_pair is None for layer in model.modules() if isinstance(layer, LowRankLinear))


def test_matrices_of_an_absent_modality_get_no_gradient() -> None:
    model = adapted()
    video, _ = model(modality(CASE, "video"), None)
    assert video is not None
    video.float().square().mean().backward()
    got = {name for name, p in adapter.lora_parameters(model).items() if p.grad is not None}
    assert got == {name for name in adapter.lora_parameters(model) if ".attn1." in name}


def test_a_pass_that_was_given_up_leaves_nothing_behind() -> None:
    """Its copies are older than the weights that are then measured and trained."""
    model, fresh = adapted(), adapted()
    inputs = modality(CASE, "video"), modality(CASE, "audio")
    model(*inputs)
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    assert all(layer.cast_pair is not None and layer.cast_pair[0].dtype is torch.bfloat16 for layer in layers)
    for one in (model, fresh):
        for parameter in adapter.lora_parameters(one).values():
            parameter.data.mul_(1.5)
    with torch.no_grad():
        assert torch.equal(model(*inputs)[0], fresh(*inputs)[0])
    again, once = trained(model), trained(fresh)
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_weights_in_the_blocks_own_dtype_are_used_as_they_are() -> None:
    model = adapted().float()
    trained(model)
    block = model.transformer_blocks[0]
    CastAdapters(block).cast(torch.float32)
    assert all(layer.cast_pair is None for layer in block.modules() if isinstance(layer, LowRankLinear))


def test_rotary_tables_are_in_the_models_dtype() -> None:
    """The reference's are; in float32 they are what they were."""
    video = modality(CASE, "video")
    exact, rounded = adapted().float(), adapted()
    for name, positions in (("video", video.positions), ("video_cross", video.positions[:, :1])):
        whole, short = (model._tables(name, positions.float()) for model in (exact, rounded))
        for table, other, theirs in zip(whole, short, exact._rotary[name](positions.float()), strict=True):
            assert torch.equal(table, theirs)
            assert other.dtype is torch.bfloat16
            assert torch.equal(other, theirs.bfloat16())


def layers(dropout: float = 0.0) -> list[Any]:
    model = nn.ModuleDict({name: nn.Linear(12, 8) for name in ("to_q", "to_k", "to_v")})
    adapter.attach(
        model, Lora(rank=3, alpha=3.0, dropout=dropout, targets=("to_q", "to_k", "to_v"), rank_pattern={"to_k": 5}), 0
    )
    for name, parameter in adapter.lora_parameters(model).items():
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapter.DropoutKeys(model).set([7])
    return [model[name] for name in ("to_q", "to_k", "to_v")]


def test_layers_of_the_same_tokens_share_a_product() -> None:
    x = torch.linspace(-1, 1, 60).view(1, 5, 12)
    three = layers()
    with torch.profiler.profile() as profile:
        joined = products(three, x)
    for found, layer in zip(joined, three, strict=True):
        torch.testing.assert_close(found, layer(x), atol=1e-6, rtol=1e-6)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::linear"] == 3 + 3 + 1


def test_layers_that_see_the_tokens_differently_do_not() -> None:
    """Every layer has its own dropout; one without an adapter, or with it switched off, is the base's."""
    x = torch.linspace(-1, 1, 60).view(1, 5, 12)
    dropped = layers(0.5)
    assert all(torch.equal(a, layer(x)) for a, layer in zip(products(dropped, x), dropped, strict=True))
    dropped[1].enable_adapters(False)
    mixed = [dropped[0], dropped[1], nn.Linear(12, 8)]
    found = products(mixed, x)
    assert torch.equal(found[1], dropped[1].base_layer(x))
    assert torch.equal(found[2], mixed[2](x))
