from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx_train import config
from ltx_train.contracts import DataError
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model import adapter, export, load_transformer, loaders, lora_file
from ltx_train.model.checkpoint import RandomWeights
from ltx_train.model.linear import keyed_mask
from ltx_train.model.transformer import Transformer
from tests.conftest import TINY
from tests.golden.support import modality, read

BLOCK_9 = "transformer_blocks.9.attn1.to_q"
LORA = adapter.Lora(rank=4, alpha=8.0, dropout=0.0, targets=("attn1.to_q", "audio_ff.net.2"))


@pytest.fixture
def model() -> Transformer:
    return load_transformer(TINY)


SETS = {
    "attention": 2304, "attention_ff": 2688, "all": 3264, "video_only": 768, "video_ff": 960, "audio_only": 960,
    "video_to_audio": 1344, "cross_modal": 1728, "id_lora": 1728,
}  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Transformer:
    return loaders.build_transformer(RandomWeights("ltx2_3_22b"))


@pytest.mark.parametrize(("name", "tensors"), SETS.items())
def test_tensor_counts_on_the_real_model(name: str, tensors: int, real: Transformer) -> None:
    """A and B of each layer."""
    targets = config.compose_config([f"adapter={name}"]).adapter.targets
    assert 2 * len(adapter.matched_modules(real, targets)) == tensors


def test_an_adapter_has_two_tensors_for_each_layer_that_it_matches() -> None:
    real = loaders.build_transformer(RandomWeights("ltx2_3_22b"))
    targets = tuple(config.compose_config(["adapter=video_only"]).adapter.targets)
    adapter.attach(real, adapter.Lora(rank=32, alpha=32, dropout=0.0, targets=targets), 0)
    assert len(adapter.lora_parameters(real)) == SETS["video_only"]


def test_suffixes_match_at_a_dot(model: Transformer) -> None:
    names = adapter.matched_modules(model, ["attn1.to_q"])
    assert names == [f"transformer_blocks.{i}.attn1.to_q" for i in range(3)]


def test_a_target_that_hits_nothing_is_named(model: Transformer) -> None:
    with pytest.raises(adapter.AdapterError, match=r"attn9\.to_q"):
        adapter.matched_modules(model, ["attn1.to_q", "attn9.to_q"])


def test_a_new_adapter_changes_nothing_and_is_keyed(model: Transformer) -> None:
    case = read("transformer_a_t2v")
    with torch.no_grad():
        before = model(modality(case, "video"), modality(case, "audio"))[0]
        adapter.attach(model, LORA, seed=3)
        after = model(modality(case, "video"), modality(case, "audio"))[0]
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    twin = load_transformer(TINY)
    adapter.attach(twin, LORA, seed=3)
    pairs = zip(adapter.lora_parameters(model).values(), adapter.lora_parameters(twin).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_adapter_weights_are_float32_on_a_bfloat16_base() -> None:
    half = load_transformer(TINY, dtype=torch.bfloat16)
    adapter.attach(half, LORA, 0)
    assert {p.dtype for p in adapter.lora_parameters(half).values()} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}


def _trained(model: Transformer) -> dict[str, torch.Tensor]:
    adapter.attach(model, LORA, 0)
    with torch.no_grad():
        for parameter in adapter.lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return {name: p.detach() for name, p in adapter.lora_parameters(model).items()}


def test_alpha_is_folded_so_that_any_loader_keeps_the_strength(model: Transformer) -> None:
    """alpha / rank = 2: merging the file at strength 1 gives the trainer's own output."""
    case = read("transformer_c_audio_ref_negative")
    weights = _trained(model)
    exported = export.lora_tensors(weights, LORA, torch.float32)
    plain = load_transformer(TINY)
    export.merge(plain, {k.removeprefix(export.LORA_PREFIX): v for k, v in exported.items()})
    with torch.no_grad():
        pairs = zip(
            model.eval()(modality(case, "video"), modality(case, "audio")),
            plain(modality(case, "video"), modality(case, "audio")),
            strict=True,
        )
        for ours, theirs in pairs:
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_diffusers_reads_the_exported_names(model: Transformer) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers as convert

    exported = export.lora_tensors(_trained(model), LORA, torch.bfloat16)
    assert all(k.startswith("diffusion_model.transformer_blocks.") for k in exported)
    converted = convert(dict(exported))
    assert set(converted) == {k.replace("diffusion_model.", "transformer.") for k in exported}


def test_disabled_and_norm_ratio(model: Transformer) -> None:
    case = read("transformer_a_t2v")
    base = load_transformer(TINY)
    _trained(model)
    with torch.no_grad(), adapter.disabled(model):
        off = model(modality(case, "video"), modality(case, "audio"))[1]
        plain = base(modality(case, "video"), modality(case, "audio"))[1]
    assert off is not None
    assert plain is not None
    assert torch.equal(off, plain)
    layer = model.get_submodule("transformer_blocks.0.attn1.to_q")
    by_hand = [
        m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight  # type: ignore[index, union-attr]
        for n, m in model.named_modules()
        if n.endswith(("attn1.to_q", "audio_ff.net.2")) and hasattr(m, "lora_A")
    ]
    assert hasattr(layer, "lora_A")
    assert len(by_hand) == 6
    moved = float(torch.cat([d.flatten() for d in by_hand]).norm().detach())
    weights = [base.get_submodule(f"transformer_blocks.{i}.{n}").weight for i in range(3) for n in LORA.targets]
    assert adapter.norm_ratios(model)[""] == pytest.approx(
        moved / float(torch.cat([w.flatten() for w in weights]).norm())
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(next(k for k in t if ".lora_B." in k)), "its other half is missing"),
        (lambda t: t.update({f"diffusion_model.{BLOCK_9}.lora_A.weight": torch.zeros(4, 64)}), "no such module"),
        (lambda t: t.update({next(iter(t)): torch.zeros(4, 63)}), "the base needs"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_bind_is_explained(model: Transformer, spoil: object, message: str) -> None:
    tensors = export.lora_tensors(_trained(load_transformer(TINY)), LORA, torch.float32)
    spoil(tensors)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        export.bind(model, {k.removeprefix(export.LORA_PREFIX): v for k, v in tensors.items()})


def test_files_that_are_no_whole_lora(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = {"diffusion_model.a.lora_A.weight": torch.zeros(2, 2), "diffusion_model.a.lora_B.weight": torch.zeros(2, 2)}
    save_file(good, path)
    whole = path.read_bytes()
    for content, message in ((whole[:-4], "not a readable"), (b"", "not a readable")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            lora_file.read_lora(path)
    save_file({"a.weight": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="is not a LoRA"):
        lora_file.read_lora(path)
    good["diffusion_model.a.lora_B.weight"] = torch.full((2, 2), float("nan"))
    save_file(good, path)
    with pytest.raises(DataError, match="not finite"):
        lora_file.read_lora(path)
    with pytest.raises(DataError, match="not finite"):
        export.write(tmp_path / "y.safetensors", good, {})
    assert not (tmp_path / "y.safetensors").exists()


def test_dropout_masks_are_keyed_by_sample_and_layer() -> None:
    keys = torch.tensor([17, -5], dtype=torch.int32)
    both = keyed_mask(keys, torch.Size((64, 128)), 0.25)
    assert torch.equal(both[1], keyed_mask(keys[1:], torch.Size((64, 128)), 0.25)[0])
    assert not torch.equal(both[0], both[1])
    assert both.float().mean() == pytest.approx(0.75, abs=0.01)
    # Neighbours in place and in key are as unrelated as any: agreement of two coins that show heads 3 times in 4.
    assert torch.equal(both[:, 48:], keyed_mask(keys, torch.Size((16, 128)), 0.25, first=48 * 128))
    other = keyed_mask(keys + 1, torch.Size((64, 128)), 0.25)
    for first, second in ((both, other), (both[:, :, 1:], both[:, :, :-1]), (both[0], both[1])):
        assert (first == second).float().mean() == pytest.approx(0.625, abs=0.02)


def test_dropout_is_recomputed_as_it_was(model: Transformer) -> None:
    """With and without recomputation, whatever torch's own random state does in between."""
    case = read("transformer_c_audio_ref_negative")
    adapter.attach(model, adapter.Lora(rank=4, alpha=8.0, dropout=0.5, targets=("attn1.to_q", "audio_ff.net.2")), 0)
    model.train()
    with pytest.raises(RuntimeError, match="dropout without keys"):
        model(modality(case, "video"), modality(case, "audio"))
    with torch.no_grad():
        for parameter in adapter.lora_parameters(model).values():
            parameter.add_(0.05)
    keys = adapter.DropoutKeys(model)
    found: list[list[torch.Tensor]] = []
    for keep, seed in ((Keep.everything, 1), (Keep.inputs, 1), (Keep.inputs, 2)):
        model.run_block = BlockRunner([keep] * 3, compiled=False)
        keys.set([seed])
        model.zero_grad()
        video, audio = model(modality(case, "video"), modality(case, "audio"))
        assert video is not None
        assert audio is not None
        torch.rand(3)
        (video.square().mean() + audio.square().mean()).backward()
        found.append([p.grad.clone() for p in adapter.lora_parameters(model).values() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
