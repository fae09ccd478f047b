"""Captions from a model behind an endpoint: what is sent, what is kept, and an endpoint that fails."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import string
import wave
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from ltx_train.data.footage import captioner
from ltx_train.data.prepare.media import Part, probe, read_clip
from ltx_train.data.prepare.sound import read_audio
from ltx_train.data.prepare.sources import read_source
from ltx_train.diffusion.grid import Bucket
from ltx_train.model import mel
from ltx_train.sampling.media import write_mp4
from tests.conftest import REPOSITORY, command
from tests.endpoint import Model, serving

CLIP = REPOSITORY / "data/sample/speaker00_0.mp4"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Generator[Model]:
    monkeypatch.setattr(captioner, "_FIRST_PAUSE_S", 0.01)
    with serving() as served:
        yield served


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(CLIP, path / name)
    return path


def caption(source: Path, model: Model, *more: str) -> int:
    return command("caption", f"data.source={source}", f"caption.url={model.url}", "caption.model=omni", *more)


def test_a_bare_folder_gets_a_table_of_captions_marked_unreviewed(
    tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, "ä b.mp4", "c.mp4")
    monkeypatch.setenv("SECRET", "key-1")
    assert caption(tmp_path, model, "caption.key_variable=SECRET", "caption.frames=3", "caption.sound=true") == 0
    rows = list(csv.DictReader((tmp_path / "captions.csv").read_text().splitlines()))
    assert [(r["video"], r["caption"], r["reviewed"]) for r in rows] == [
        ("c.mp4", "clip 1", "no"), ("ä b.mp4", "clip 2", "no"),
    ]  # fmt: skip
    assert [c.reviewed for c in read_source(tmp_path)] == [False, False]
    headers, body = model.requests[0]
    assert headers["Authorization"] == "Bearer key-1"
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", *["image_url"] * 3, "input_audio"]
    picture = tmp_path / "seen.jpg"
    picture.write_bytes(base64.b64decode(parts[1]["image_url"]["url"].partition(",")[2]))
    assert read_clip(picture, Part(bucket=Bucket(64, 64, 1), fps=1.0)).pixels is not None
    with wave.open(io.BytesIO(base64.b64decode(parts[4]["input_audio"]["data"]))) as heard:
        assert heard.getframerate() == 16000
        assert heard.getnframes() / 16000 == pytest.approx(1.4, abs=0.15)
    assert "key-1" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.json", "rows.jsonl", "CAPTIONS.json"])
def test_only_missing_captions_are_asked_for_and_the_rest_of_the_table_stays(
    tmp_path: Path, model: Model, name: str
) -> None:
    folder_of(tmp_path, "a.mp4", "b.mp4")
    rows = [{"video": "a.mp4", "caption": "mine; é", "speaker": "x"}, {"video": "b.mp4", "caption": "", "speaker": "y"}]
    mark = "\t" if name.endswith("tsv") else ";"
    texts = {
        "json": json.dumps({"captions": rows} if name == "CAPTIONS.json" else rows),
        "jsonl": "\n".join(json.dumps(row) for row in rows),
        "csv": f"video{mark}caption{mark}speaker\na.mp4{mark}\"mine; é\"{mark}x\nb.mp4{mark}{mark}y\n",
    }  # fmt: skip
    (tmp_path / name).write_text(texts["csv" if name.endswith("tsv") else name.partition(".")[2]], encoding="utf-8")
    assert caption(tmp_path / name, model) == 0
    found = {clip.key: clip for clip in read_source(tmp_path / name)}
    assert (found["a"].caption, found["a"].speaker, found["a"].reviewed) == ("mine; é", "x", True)
    assert (found["b"].caption, found["b"].speaker, found["b"].reviewed) == ("clip 1", "y", False)
    assert len(model.requests) == 1


def test_other_trainers_columns_and_parts_of_files(tmp_path: Path, model: Model) -> None:
    """A caption under another name is kept, the missing one is written into that column, of the row's part alone."""
    folder_of(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "rows.csv").write_text("media_path,text,start,end\na.mp4,mine,,\nb.mp4,,0.4,0.9\n")
    assert caption(tmp_path / "rows.csv", model, "caption.sound=true", "caption.frames=2") == 0
    found = {clip.key: clip.caption for clip in read_source(tmp_path / "rows.csv")}
    assert found == {"a": "mine", "b_0_4s": "clip 1"}
    (request,) = model.requests
    sound = request[1]["messages"][0]["content"][-1]["input_audio"]["data"]
    with wave.open(io.BytesIO(base64.b64decode(sound))) as heard:
        assert heard.getnframes() / 16000 == pytest.approx(0.5, abs=0.01)


def test_answers_outlive_an_endpoint_that_fails(
    tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """One refused at first, one answered, then an outage: the same command asks for the rest alone."""
    folder_of(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    model.answers = [503, 429, "first", *[500] * 4]
    assert caption(tmp_path, model) == 78
    assert "does not answer after 4 tries (500" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "captions.csv").read_text().splitlines()))
    assert [row["caption"] for row in rows] == ["first", "", ""]
    assert caption(tmp_path, model) == 0
    assert len(model.requests) == 7 + 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (401, "refuses the key (401"),
        (404, "refuses the request (404"),
        ({"choices": []}, "answers no chat completion"),
        ("  ", "answers nothing: raise caption.max_tokens"),
    ],
)
def test_refusals_are_told(
    answer: Any, said: str, tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path, "a.mp4")
    model.answers = [answer]
    assert caption(tmp_path, model) == 78
    assert said in capsys.readouterr().err
    assert len(model.requests) == 1


def test_mistakes_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path, "a.mp4")
    words = [f"data.source={tmp_path}", "caption.model=x"]
    assert command("caption", *words) == 77
    assert "caption.url is not set: give an OpenAI-compatible endpoint" in capsys.readouterr().err
    assert command("caption", *words, "caption.url=https://api.example.org/v1", "caption.key_variable=NO_KEY_X") == 77
    assert "the variable NO_KEY_X is not set" in capsys.readouterr().err
    assert not (tmp_path / "captions.csv").exists()


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A speech model of random weights: letters for sounds."""
    folder = tmp_path_factory.mktemp("speech")
    letters = {letter: n for n, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_uppercase])}
    (folder / "vocab.json").write_text(json.dumps(letters))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>", word_delimiter_token="|")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=False)
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    sizes = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Wav2Vec2ForCTC(sizes).save_pretrained(folder)
    return folder


def heard(model: Path, clip: Path) -> str:
    """What the model hears, without the pipeline: the likeliest letter of each frame, once."""
    waveform, rate = read_audio(clip, 0.0, probe(clip).seconds)
    assert waveform is not None
    mono = mel.resample(mel.to_stereo(waveform).mean(dim=0, keepdim=True), rate)[0].numpy()
    processor = Wav2Vec2Processor.from_pretrained(model)
    values = processor(mono, sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        letters = Wav2Vec2ForCTC.from_pretrained(model)(values).logits.argmax(-1)
    return " ".join(processor.batch_decode(letters)[0].split())


def test_transcripts_come_first_and_go_into_the_question(
    tmp_path: Path, model: Model, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each clip is transcribed once; a clip without sound stays without. A second command asks for captions."""
    folder_of(tmp_path, "a.mp4", "b.mp4")
    write_mp4(tmp_path / "mute.mp4", torch.zeros(10, 64, 64, 3, dtype=torch.uint8), None, 25.0)
    (tmp_path / "rows.csv").write_text("video,caption,transcript\na.mp4,,\nb.mp4,,mine\nmute.mp4,,\n")
    words = [f"data.source={tmp_path / 'rows.csv'}", f"caption.speech={speech}"]
    assert command("caption", *words) == 0
    assert "1 transcripts written, 1 kept, 1 without sound" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["transcript"] for row in rows] == [heard(speech, tmp_path / "a.mp4"), "mine", ""]
    assert len(rows[0]["transcript"]) > 3
    assert not model.requests
    assert caption(tmp_path / "rows.csv", model, f"caption.speech={speech}") == 0
    questions = [body["messages"][0]["content"][0]["text"] for _, body in model.requests]
    assert [question.partition("Transcript: ")[2] for question in questions] == [row["transcript"] for row in rows]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("caption.speech={empty}",), 77, "is no speech model of transformers"),
        (("caption.speech={empty}", "caption.url=http://127.0.0.1:9/v1"), 77, "caption.model"),
        ((), 77, "caption.url"),
    ],
)
def test_what_no_model_can_answer_is_refused(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path, "a.mp4")
    given = [word.format(empty=tmp_path / "empty") for word in words]
    assert command("caption", f"data.source={tmp_path}", *given) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) in (["a.mp4", "empty"], [".lock", "a.mp4", "empty"])
