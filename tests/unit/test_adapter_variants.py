"""Ranks by pattern, rsLoRA, DoRA, continued and merged LoRAs, and which layers a mode's loss reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ltx_train.contracts import DataError, Mode, Role
from ltx_train.diffusion import conditions, objective
from ltx_train.diffusion.loss import Weights
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.model import adapter, export, load_transformer, lora_file
from ltx_train.model.adapter import Lora
from ltx_train.model.checkpoint import CheckpointFile
from ltx_train.model.linear import LowRankLinear
from ltx_train.model.merged import MergedSource
from ltx_train.model.reach import sees_loss
from ltx_train.model.transformer import Transformer
from tests.conftest import TINY
from tests.golden.support import modality, read
from tests.unit.test_modes import batch

PLAIN = Lora(rank=4, alpha=8.0, dropout=0.0, targets=("attn1.to_q", "audio_ff.net.2"))
VARIANTS = {
    "plain": PLAIN,
    "patterns": replace(PLAIN, rank_pattern={"audio_ff.net.2": 2}, alpha_pattern={"attn1.to_q": 2.0}),
    "rslora": replace(PLAIN, rslora=True),
    "dora": replace(PLAIN, dora=True),
}


def moved(lora: Lora) -> Transformer:
    """The tiny model with an adapter that has learned something."""
    model = load_transformer(TINY)
    adapter.attach(model, lora, 0)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.lora_parameters(model).values()):
            stream = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.1)
    return model.eval()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    case = read("transformer_a_t2v")
    with torch.no_grad():
        return list(model(modality(case, "video"), modality(case, "audio")))


def written(model: nn.Module, lora: Lora, path: Path) -> Path:
    export.write(path, export.lora_tensors(adapter.lora_parameters(model), lora, torch.float32), {"rank": "4"})
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    model = load_transformer(TINY)
    before = outputs(model)
    adapter.attach(model, VARIANTS[name], 0)
    for first, second in zip(before, outputs(model), strict=True):
        torch.testing.assert_close(first, second, atol=4e-6, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_bound_merged_and_streamed_files_give_the_trainers_output(name: str, tmp_path: Path) -> None:
    """One file, three ways of using it: as an adapter, merged into weights, merged while they are read."""
    lora = VARIANTS[name]
    trained = moved(lora)
    tensors, _ = lora_file.read_lora(written(trained, lora, tmp_path / "lora.safetensors"))
    bound, merged = load_transformer(TINY), load_transformer(TINY)
    export.bind(bound, tensors)
    export.merge(merged, tensors)
    source = MergedSource.open(CheckpointFile.open(TINY), tmp_path / "lora.safetensors", 1.0)
    expected = outputs(trained)
    for other in (bound, merged, load_transformer(source)):
        for first, second in zip(expected, outputs(other), strict=True):
            torch.testing.assert_close(first, second, atol=2e-5, rtol=0)
    adapter.detach(bound)
    for first, second in zip(outputs(load_transformer(TINY)), outputs(bound), strict=True):
        assert torch.equal(first, second)


def test_scales_and_ranks_by_pattern() -> None:
    lora = VARIANTS["patterns"]
    names = adapter.lora_parameters(moved(lora))
    assert names["transformer_blocks.0.audio_ff.net.2.lora_A.weight"].shape[0] == 2
    assert names["transformer_blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 4
    assert lora.scale_of("transformer_blocks.0.audio_ff.net.2") == 8.0 / 2
    assert lora.scale_of("transformer_blocks.0.attn1.to_q") == 2.0 / 4
    assert VARIANTS["rslora"].scale_of("x.attn1.to_q") == 8.0 / 2


def test_dora_is_pefts() -> None:
    """The same weights in peft's own DoRA layer give the same output and gradients."""
    from peft import LoraConfig, inject_adapter_in_model

    stream = torch.Generator().manual_seed(0)
    theirs, ours = nn.Sequential(nn.Linear(12, 8)), nn.Sequential(nn.Linear(12, 8))
    ours.load_state_dict(theirs.state_dict())
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True), theirs)
    adapter.attach(ours, Lora(rank=3, alpha=6.0, dropout=0.0, targets=("0",), dora=True), 0)
    a, b = torch.randn(3, 12, generator=stream), torch.randn(8, 3, generator=stream)
    found: list[list[torch.Tensor]] = []
    for layer in (theirs[0], ours[0]):
        part: Any = layer
        part.lora_A["default"].weight.data.copy_(a)
        part.lora_B["default"].weight.data.copy_(b)
        part.lora_magnitude_vector["default"].weight.data.mul_(1.3)
        result = part(torch.linspace(-1, 1, 24).view(2, 12))
        result.square().sum().backward()
        weights = (part.lora_A["default"], part.lora_B["default"], part.lora_magnitude_vector["default"])
        found.append([result.detach(), *(w.weight.grad for w in weights)])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_how_a_begins(init: str) -> None:
    model = load_transformer(TINY)
    adapter.attach(model, replace(PLAIN, init=init), 0)
    weight = adapter.lora_parameters(model)["transformer_blocks.0.attn1.to_q.lora_A.weight"].detach()
    expected = {"kaiming": 1 / (3 * 64) ** 0.5, "gaussian": 1 / 4, "orthogonal": 1 / 8}[init]
    assert float(weight.std()) == pytest.approx(expected, rel=0.25)
    if init == "orthogonal":
        torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_starts_from_a_file(name: str, tmp_path: Path) -> None:
    """A run with another alpha starts from the file's output all the same."""
    lora = VARIANTS[name]
    trained = moved(lora)
    tensors, _ = lora_file.read_lora(written(trained, lora, tmp_path / "lora.safetensors"))
    other = replace(lora, alpha=20.0)
    model = load_transformer(TINY)
    adapter.attach(model, other, 1)
    assert export.start_from(model, tensors, other) == []
    for first, second in zip(outputs(trained), outputs(model.eval()), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (replace(PLAIN, targets=("attn1.to_q",)), "3 layers that this run does not train .first: .*audio_ff.net.2"),
        (replace(PLAIN, rank=8), r"set adapter\.rank"),
    ],
)
def test_nothing_of_a_file_is_lost_silently(asked: Lora, message: str, tmp_path: Path) -> None:
    tensors, _ = lora_file.read_lora(written(moved(PLAIN), PLAIN, tmp_path / "lora.safetensors"))
    model = load_transformer(TINY)
    adapter.attach(model, asked, 0)
    with pytest.raises(DataError, match=message):
        export.start_from(model, tensors, asked)


def test_layers_that_the_file_has_not_begin_at_zero(tmp_path: Path) -> None:
    narrow = replace(PLAIN, targets=("attn1.to_q",))
    tensors, _ = lora_file.read_lora(written(moved(narrow), narrow, tmp_path / "lora.safetensors"))
    model = load_transformer(TINY)
    adapter.attach(model, PLAIN, 0)
    assert len(export.start_from(model, tensors, PLAIN)) == 3
    assert adapter.unmoved(model) == [f"transformer_blocks.{i}.audio_ff.net.2" for i in range(3)]


def test_alphas_of_other_trainers_are_folded(tmp_path: Path) -> None:
    trained = moved(PLAIN)
    tensors = {n: p.detach().clone() for n, p in adapter.lora_parameters(trained).items()}
    modules = {lora_file.module_of(n) for n in tensors}
    stored = {f"{lora_file.LORA_PREFIX}{n}": t for n, t in tensors.items()}
    stored |= {f"{lora_file.LORA_PREFIX}{m}.alpha": torch.tensor(8.0) for m in modules}
    export.write(tmp_path / "other.safetensors", stored, {})
    found, _ = lora_file.read_lora(tmp_path / "other.safetensors")
    bound = load_transformer(TINY)
    export.bind(bound, found)
    for first, second in zip(outputs(trained), outputs(bound), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_a_merged_base_is_another_base(tmp_path: Path) -> None:
    path = written(moved(PLAIN), PLAIN, tmp_path / "lora.safetensors")
    base = CheckpointFile.open(TINY)
    prints = [
        source.fingerprint("model.diffusion_model.")
        for source in (base, MergedSource.open(base, path, 1.0), MergedSource.open(base, path, 0.5))
    ]
    assert len(set(prints)) == 3
    assert MergedSource.open(base, path, 1.0).fingerprint("vae.") == base.fingerprint("vae.")
    export.write(tmp_path / "alien.safetensors", {"diffusion_model.nowhere.lora_A.weight": torch.ones(1, 1)}, {})
    with pytest.raises(DataError, match="do not bind"):
        MergedSource.open(base, tmp_path / "alien.safetensors", 1.0)


MODES = {
    "t2av": Mode(), "a2v": Mode(audio=Role.freeze), "v2a": Mode(video=Role.freeze),
    "t2v": Mode(audio=Role.absent), "t2a": Mode(video=Role.absent),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_the_graph_is_the_models_own(name: str) -> None:
    """Every linear layer that `reach` calls alive gets a gradient, and no other one does."""
    mode = MODES[name]
    model = load_transformer(TINY).requires_grad_(True)
    data = batch(mode, 1)
    made = conditions.assemble(data, mode, conditions.draw(data, mode, SigmaDistribution(), 1, sigma=0.6))
    objective.losses(model, made, Weights()).loss.backward()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            learns = module.weight.grad is not None and bool(module.weight.grad.any())
            # Keys of gates and prompts that no adapter is ever put on are judged by whether they run.
            if module_name.startswith("transformer_blocks"):
                assert sees_loss(module_name, [mode], 3) == learns, module_name


def test_layers_out_of_reach_are_left_alone() -> None:
    model = load_transformer(TINY)
    adapter.attach(model, replace(PLAIN, targets=("to_q",), modes=(MODES["a2v"],)), 0)
    names = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert len(names) == 3 * 6 - 1
    assert "transformer_blocks.2.video_to_audio_attn.to_q" not in names
    both = adapter.matched_modules(load_transformer(TINY), ["to_q"], (MODES["a2v"], MODES["t2av"]))
    assert len(both) == 18
    with pytest.raises(adapter.AdapterError, match=r"never reaches: audio_attn1\.to_q"):
        adapter.matched_modules(load_transformer(TINY), ["attn1.to_q", "audio_attn1.to_q"], (MODES["t2v"],))
