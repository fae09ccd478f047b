from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_train.contracts import DataError
from ltx_train.model import load_text_connectors, text
from tests.conftest import TINY


def test_captions_differ_and_repeat() -> None:
    connectors = load_text_connectors(TINY)
    encoder = text.StandInEncoder(32, 5)
    first, again = (text.contexts(encoder, connectors, "a red car") for _ in range(2))
    other, empty = text.contexts(encoder, connectors, "a blue car"), text.contexts(encoder, connectors, "")
    assert first[0].shape == (128, 64)
    assert first[1].shape == (128, 32)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert bool(torch.isfinite(empty[0]).all())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma-3 text model of four layers, width 32, with random weights, in the layout of the real folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gemma")
    words = ["<pad>", "<bos>", "<unk>", "a", "red", "car"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = Gemma3TextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3TextModel(config).save_pretrained(folder)
    return folder


def test_gemma_gives_all_hidden_states_left_padded(gemma: Path) -> None:
    encoder = text.GemmaEncoder(gemma, device="cpu", dtype=torch.float32, tokens=128)
    hidden, mask = encoder.encode(" a red car ")
    assert hidden.shape == (1, 128, 32, 5)
    assert mask[0].tolist() == [0] * 125 + [1] * 3
    video, audio = text.contexts(encoder, load_text_connectors(TINY), "a red car")
    assert video.shape == (128, 64)
    assert audio.shape == (128, 32)
    assert bool(torch.isfinite(video).all())


def test_a_folder_that_is_no_encoder_is_named(tmp_path: Path, gemma: Path) -> None:
    with pytest.raises(DataError, match=r"model\.text_encoder"):
        text.GemmaEncoder(tmp_path, device="cpu", dtype=torch.float32)
    assert text.gemma_fingerprint(gemma) == text.gemma_fingerprint(gemma)


def test_streamed_weights_give_the_same_states(gemma: Path) -> None:
    """Every weight comes to the device for its own product: here the same device, on which they are gone afterwards."""
    whole = text.GemmaEncoder(gemma, device="cpu", dtype=torch.float32, tokens=128)
    streamed = text.GemmaEncoder(gemma, device="cpu", dtype=torch.float32, tokens=128, streamed=True)
    for caption in ("a red car", "car"):
        assert all(torch.equal(*pair) for pair in zip(whole.encode(caption), streamed.encode(caption), strict=True))
    assert all(parameter.is_meta for parameter in streamed._model.parameters())
