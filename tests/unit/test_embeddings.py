"""Embeddings of voices by transformers' x-vector models, and of faces by a network in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from ltx_train.contracts import ConfigError, DataError
from ltx_train.data.footage import looking
from ltx_train.data.prepare.sound import read_audio
from ltx_train.evaluation import embeddings
from ltx_train.evaluation.embeddings import FaceModel, SpeakerModel
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def speaker_model(tmp_path_factory: pytest.TempPathFactory) -> SpeakerModel:
    """The architecture of WavLM for speaker verification, small and random."""
    folder = tmp_path_factory.mktemp("wavlm")
    torch.manual_seed(0)
    small = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
        tdnn_dim=(16, 16, 16, 16, 24), xvector_output_dim=12, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    WavLMForXVector(small).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return SpeakerModel(str(folder))


def test_a_voice_has_an_embedding_of_length_one(speaker_model: SpeakerModel) -> None:
    vectors = []
    for name in ("speaker01_0", "speaker02_0"):
        waveform, rate = read_audio(REPOSITORY / f"data/sample/{name}.mp4")
        assert waveform is not None
        vectors.append(speaker_model.of_sound(waveform, rate))
        assert speaker_model.of_sound(waveform.expand(2, -1), rate) == pytest.approx(vectors[-1], abs=1e-5)
    assert len(vectors[0]) == 12
    assert np.linalg.norm(vectors[0]) == pytest.approx(1)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-4)


def test_a_model_without_a_head_is_refused(tmp_path: Path, speaker_model: SpeakerModel) -> None:
    """transformers would give it a random one."""
    speaker_model._model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "wavlm" in n}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match="has no x-vector head"):
        SpeakerModel(str(tmp_path))


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"swap\.speaker_model=.*is no speaker model"):
        SpeakerModel(str(tmp_path))
    (tmp_path / "face.onnx").write_bytes(b"no network")
    with pytest.raises(DataError, match=r"swap\.face_model=.*is no network"):
        FaceModel(str(tmp_path / "face.onnx"))


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message: a varint, or bytes with their length."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def flattening_network(path: Path) -> Path:
    """An ONNX file that flattens its input: the embedding is the face itself, pixel by pixel."""

    def tensor(name: bytes, *sizes: int) -> bytes:
        shape = b"".join(field(1, field(1, size)) for size in sizes)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    node = field(1, b"x") + field(2, b"y") + field(4, b"Flatten")
    graph = (
        field(1, node) + field(2, b"g") + field(11, tensor(b"x", 1, 3, 112, 112)) + field(12, tensor(b"y", 1, 37632))
    )
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13)))
    return path


def test_a_face_is_cut_out_and_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FaceModel(str(flattening_network(tmp_path / "face.onnx")))
    pixels = torch.zeros(9, 40, 80, 3, dtype=torch.uint8)
    pixels[:, 10:30, 40:60, 0] = 255
    monkeypatch.setattr(looking, "face", lambda _: (0.5, 0.25, 0.75, 0.75))
    vector = np.asarray(model.of_pictures(pixels)).reshape(3, 112, 112)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert vector[0] == pytest.approx(np.full((112, 112), 1 / 37632**0.5)), "red, and nothing beside the face"
    assert vector[1:] == pytest.approx(np.full((2, 112, 112), -1 / 37632**0.5))
    monkeypatch.setattr(looking, "face", lambda _: None)
    assert model.of_pictures(pixels) == ()


def test_vectors_of_nothing_are_empty() -> None:
    assert embeddings._unit(np.zeros(3)) == ()
    assert embeddings._unit(np.full(3, np.nan)) == ()
