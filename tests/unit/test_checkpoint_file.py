from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_train.contracts import DataError
from ltx_train.model import (
    load_audio_vae,
    load_text_connectors,
    load_transformer,
    load_video_vae,
    load_vocoder,
    loaders,
)
from ltx_train.model.checkpoint import CheckpointFile, RandomWeights
from tests.conftest import TINY

PREFIX = loaders.TRANSFORMER_PREFIX


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return load_file(TINY)


def write(path: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    config = json.loads(json.dumps(CheckpointFile.open(TINY).config))
    config["transformer"].update(changes)
    save_file(tensors, path, {"config": json.dumps(config)})
    return path


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{PREFIX}patchify_proj.bias"]
    tensors[f"{PREFIX}surprise.weight"] = torch.zeros(1)
    tensors[f"{PREFIX}proj_out.bias"] = torch.zeros(3)
    with pytest.raises(DataError) as error:
        load_transformer(write(tmp_path / "x.safetensors", tensors))
    text = str(error.value)
    assert "1 missing: model.diffusion_model.patchify_proj.bias" in text
    assert "1 left over: model.diffusion_model.surprise.weight" in text
    assert "model.diffusion_model.proj_out.bias is [3], the configuration says [16]" in text


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (load_video_vae, "vae.decoder.conv_in.conv.bias"),
        (load_audio_vae, "audio_vae.per_channel_statistics.mean-of-means"),
        (load_vocoder, "vocoder.mel_stft.mel_basis"),
        (load_text_connectors, "model.diffusion_model.video_embeddings_connector.learnable_registers"),
    ],
)
def test_every_component_names_what_is_missing_and_left_over(
    loader: Any, name: str, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors[f"{name}.surprise"] = tensors.pop(name)
    with pytest.raises(DataError) as error:
        loader(write(tmp_path / "x.safetensors", tensors))
    assert f"1 missing: {name}" in str(error.value)
    assert f"1 left over: {name}.surprise" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", TINY.read_bytes()[:5000]])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.safetensors is not a readable safetensors file"):
        CheckpointFile.open(tmp_path / "x.safetensors")


def test_missing_file_and_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint at"):
        CheckpointFile.open(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no `config` in its metadata"):
        CheckpointFile.open(tmp_path / "x.safetensors")


def test_unknown_architecture_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path / "x.safetensors", tensors, cross_attention_adaln=False)
    with pytest.raises(DataError, match="cross_attention_adaln=False"):
        load_transformer(path)


def test_ltx_2_5_differences_come_from_metadata(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    kept = {k: v for k, v in tensors.items() if not (".ff.net" in k and k.endswith("bias") and "connector" not in k)}
    assert len(tensors) - len(kept) == 6
    kept[f"{PREFIX}keyframes_abs_pos_embedding"] = torch.ones(1, 64)
    path = write(tmp_path / "x.safetensors", kept, ff_bias=False, use_keyframes_abs_pos_embedding=True)
    model = load_transformer(path)
    assert float(model.keyframes_abs_pos_embedding.sum()) == 64
    assert not [n for n, _ in model.named_parameters() if ".ff." in n and n.endswith("bias") and "audio" not in n]


def test_real_sizes_on_the_meta_device() -> None:
    source = RandomWeights("ltx2_3_22b")
    model = loaders.build_transformer(source)
    assert sum(p.numel() for p in model.parameters()) == 18_988_838_144
    shapes = loaders.expected_tensors(source)
    connectors = [k for k in shapes if "connector" in k or k.startswith("text_embedding_projection")]
    assert sum(torch.Size(shapes[k]).numel() for k in connectors) == 1_612_546_304 + 403_620_096 + 1_156_061_184
    assert len([k for k in shapes if k.startswith(PREFIX) and "embeddings_connector" not in k]) == 4186


def test_the_tiny_preset_is_the_golden_layout() -> None:
    shapes = loaders.expected_tensors(RandomWeights("tiny"))
    assert shapes == CheckpointFile.open(TINY).shapes


def test_random_weights_are_keyed() -> None:
    first, second, other = (load_transformer(RandomWeights("tiny", seed)) for seed in (0, 0, 1))
    assert torch.equal(first.proj_out.weight, second.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)
    assert bool(torch.isfinite(torch.cat([p.flatten() for p in first.parameters()])).all())


def test_fingerprints(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The same component has the same fingerprint in another file; one changed number changes it."""
    original = CheckpointFile.open(TINY)
    reordered = write(tmp_path / "a.safetensors", dict(reversed(tensors.items())))
    assert CheckpointFile.open(reordered).fingerprint("vae.") == original.fingerprint("vae.")
    tensors["vae.encoder.conv_in.conv.bias"] += 1
    changed = CheckpointFile.open(write(tmp_path / "b.safetensors", tensors))
    assert changed.fingerprint("vae.") != original.fingerprint("vae.")
    assert changed.fingerprint("audio_vae.") == original.fingerprint("audio_vae.")


def test_loading_converts_and_freezes() -> None:
    model = load_transformer(TINY, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert load_video_vae(TINY).dtype == torch.float32
