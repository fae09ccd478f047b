"""Adapters of every kind load with diffusers' `load_lora_weights`, and its model computes the same with them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers
from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin
from torch import Tensor

from ltx_train import config
from ltx_train.assembly import from_config
from ltx_train.config.files import group_options
from ltx_train.contracts import Modality
from ltx_train.model import adapter, export, load_transformer, lora_file, lora_formats, lora_tools
from ltx_train.model.checkpoint import open_source
from ltx_train.model.transformer import Transformer
from tests.conftest import cut
from tests.golden.support import modality, read

RANK = 4
# Sets of layers that are chosen by name, and adapters that differ in more than their layers.
SETS = sorted(set(group_options()["adapter"]) - {"auto", "full"})
SPECIAL: dict[str, tuple[str, ...]] = {
    "scaled": ("adapter=attention", "adapter.alpha=9", "adapter.rslora=true"),
    "ranks by layer": ("adapter=attention_ff", "adapter.rank_pattern={to_q: 7, ff.net.2: 2}"),
    "everything": (
        "adapter=all",
        "adapter.targets=[linear,linear_1,linear_2,patchify_proj,audio_patchify_proj,proj_out,audio_proj_out]",
    ),
}


class Pipeline(LTX2LoraLoaderMixin):
    """The part of diffusers' pipeline that loads LoRAs."""

    def __init__(self, transformer: LTX2VideoTransformer3DModel) -> None:
        self.transformer = transformer
        self.hf_device_map = None
        self.components = {"transformer": transformer}


@pytest.fixture(scope="module")
def theirs() -> LTX2VideoTransformer3DModel:
    """diffusers' model with the weights of the golden checkpoint's first block."""
    t = open_source(cut(1)).config["transformer"]
    same = (
        "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
        "audio_in_channels", "audio_out_channels", "audio_num_attention_heads", "audio_attention_head_dim",
        "audio_cross_attention_dim", "caption_channels",
    )  # fmt: skip
    model = LTX2VideoTransformer3DModel(
        **{name: t[name] for name in same}, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True,
        audio_cross_attn_mod=True, rope_type="split", use_prompt_embeddings=False,
        cross_attn_timestep_scale_multiplier=t["av_ca_timestep_scale_multiplier"],
    )  # fmt: skip
    own = {f"diffusion_model.{name}": tensor for name, tensor in load_transformer(cut(1)).state_dict().items()}
    named = _convert_non_diffusers_ltx2_lora_to_diffusers(own)
    model.load_state_dict({name.removeprefix("transformer."): tensor for name, tensor in named.items()})
    return model.eval().requires_grad_(False)


def inputs() -> tuple[Modality, Modality]:
    case = read("transformer_a_t2v")
    video, audio = modality(case, "video"), modality(case, "audio")
    assert video is not None
    assert audio is not None
    return video, audio


@torch.no_grad()
def by_diffusers(model: LTX2VideoTransformer3DModel) -> tuple[Tensor, Tensor]:
    video, audio = inputs()
    return model(
        hidden_states=video.latent, audio_hidden_states=audio.latent, encoder_hidden_states=video.context,
        audio_encoder_hidden_states=audio.context, timestep=video.timesteps * 1000,
        audio_timestep=audio.timesteps * 1000, sigma=video.sigma * 1000, audio_sigma=audio.sigma * 1000,
        video_coords=video.positions, audio_coords=audio.positions, use_cross_timestep=True, return_dict=False,
    )  # fmt: skip


@torch.no_grad()
def by_us(model: Transformer) -> tuple[Tensor, Tensor]:
    video, audio = model(*inputs())
    assert video is not None
    assert audio is not None
    return video, audio


@contextmanager
def loaded(model: LTX2VideoTransformer3DModel, path: Path) -> Generator[None]:
    """The model with a file that diffusers has loaded."""
    Pipeline(model).load_lora_weights(path)
    try:
        yield
    finally:
        model.unload_lora()


def trained(*words: str) -> dict[str, Tensor]:
    """The tensors of a file as a run exports it, with weights that are easily seen."""
    composed = config.compose_config([f"model.path={cut(1)}", f"adapter.rank={RANK}", "adapter.alpha=4", *words])
    lora, model = from_config.lora(composed), load_transformer(cut(1))
    adapter.attach(model, lora, 0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: p.detach() + torch.randn(p.shape, generator=generator) * 0.1
        for name, p in adapter.lora_parameters(model).items()
    }
    named = export.lora_tensors(weights, lora, torch.float32)
    return {name.removeprefix(lora_file.LORA_PREFIX): tensor for name, tensor in named.items()}


def close(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], limit: float = 2e-5) -> bool:
    return all(float((a - b).abs().max()) < limit for a, b in zip(first, second, strict=True))


def test_both_models_compute_the_same_without_an_adapter(theirs: LTX2VideoTransformer3DModel) -> None:
    assert close(by_diffusers(theirs), by_us(load_transformer(cut(1))))


@pytest.mark.parametrize("kind", ["comfyui", "diffusers"])
@pytest.mark.parametrize("name", [*SETS, *SPECIAL])
def test_an_adapter_computes_in_diffusers_as_here(
    name: str, kind: str, theirs: LTX2VideoTransformer3DModel, tmp_path: Path
) -> None:
    tensors = trained(*SPECIAL.get(name, (f"adapter={name}",)))
    path = lora_formats.write(tmp_path / "a.safetensors", tensors, {}, kind)
    before = by_diffusers(theirs)
    with loaded(theirs, path):
        layers = [module for module in theirs.modules() if hasattr(module, "lora_A")]
        assert len(layers) == len(tensors) / 2, "every layer of the file is loaded"
        ours = load_transformer(cut(1))
        export.bind(ours, lora_file.read_lora(path)[0])
        after = by_diffusers(theirs)
        assert close(after, by_us(ours))
        assert not close(after, before, 1e-3)
        theirs.set_adapters(theirs.active_adapters(), [0.5])
        adapter.set_strength(ours, 0.5)
        assert close(by_diffusers(theirs), by_us(ours))
    assert close(by_diffusers(theirs), before)


def test_magnitudes_load_as_a_plain_file(theirs: LTX2VideoTransformer3DModel, tmp_path: Path) -> None:
    """diffusers leaves DoRA's magnitudes out with a warning; `lora.do=plain` makes a file that it applies."""
    tensors, base = trained("adapter=attention", "adapter.dora=true"), load_transformer(cut(1))
    weights = {m: base.get_submodule(m).weight for m in {lora_file.module_of(name) for name in tensors}}
    plain, lost = lora_tools.plain(tensors, weights, 64)
    path = lora_formats.write(tmp_path / "a.safetensors", plain, {}, "diffusers")
    export.bind(base, tensors)
    assert lost < 1e-3
    with loaded(theirs, path):
        assert close(by_diffusers(theirs), by_us(base), 1e-3)
