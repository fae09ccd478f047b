from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import webdataset

from ltx_train.contracts import Condition, ConditionKind, DataError, Mode
from ltx_train.data import index
from ltx_train.data.columns import Rows
from ltx_train.data.order import Address
from ltx_train.data.prepare import media, sound, sources, splits
from ltx_train.data.prepare.encode import loudest_window, rms_db
from ltx_train.data.reader import AUDIO, VIDEO, VOICE, Reader, ReadRequest
from ltx_train.diffusion.grid import Bucket
from ltx_train.model import loaders
from tests.conftest import REPOSITORY, command, settings

A_VOICE = Condition(kind=ConditionKind.reference)
CLIP = REPOSITORY / "data/sample/speaker00_0.mp4"


def table(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("kind", ["CAPTIONS.json", "rows.csv", "rows.jsonl", "rows.json"])
def test_layouts(tmp_path: Path, kind: str) -> None:
    for name in ("ünïcode clip.mp4", "b.mp4"):
        shutil.copy(CLIP, tmp_path / name)
    rows = [{"video": "ünïcode clip.mp4", "caption": 'says: "hi, you"', "speaker": "Zoë"}]
    rows += [{"video": "b.mp4", "caption": "y", "speaker": "B"}]
    texts = {
        "CAPTIONS.json": json.dumps({"captions": [{**r, "file": r.pop("video")} for r in map(dict, rows)]}),
        "rows.csv": 'video,caption,speaker\nünïcode clip.mp4,"says: ""hi, you""",Zoë\nb.mp4,y,B\n',
        "rows.jsonl": "\n".join(json.dumps(r) for r in rows) + "\n",
        "rows.json": json.dumps(rows),
    }
    path = table(tmp_path, kind, texts[kind])
    found = sources.read_source(tmp_path if kind == "CAPTIONS.json" else path)
    assert [c.key for c in found] == ["b", "ünïcode_clip"]
    assert found[1].speaker == "Zoë"
    assert found[1].caption == 'says: "hi, you"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no clips"),
        ('{"video": "a.mp4", "capton": "x"}', "unknown column 'capton'; did you mean 'caption'"),
        ('{"video": "a.mp4"}', "needs the columns"),
        ('{"video": "gone.mp4", "caption": "x"}', "do not exist"),
        ('{"video": "a.mp4", "caption": "x"}\n{"video": "a.mp4", "caption": "y"}', "more than once"),
        ('{"video": "a.mp4", "caption": "x", "split": "test"}', "must be train or heldout"),
        ('{"video": ', "cannot be read as jsonl"),
        ('"a.mp4"', "entry 1: an object with the columns video and caption is expected"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    shutil.copy(CLIP, tmp_path / "a.mp4")
    with pytest.raises(DataError, match=message):
        sources.read_source(table(tmp_path, "rows.jsonl", text))


def test_an_unquoted_comma_in_a_caption_is_named(tmp_path: Path) -> None:
    shutil.copy(CLIP, tmp_path / "a.mp4")
    text = "video,caption,speaker\na.mp4,A man, smiling,anna\n"
    with pytest.raises(DataError, match="put quotes around a caption that contains a comma"):
        sources.read_source(table(tmp_path, "rows.csv", text))


def clip(key: str, speaker: str, split: str = "", file: str = "") -> sources.Clip:
    return sources.Clip(key=key, video=Path(file or f"{key}.mp4"), caption="", speaker=speaker, split=split)


def assigned(clips: list[sources.Clip], speakers: float = 0.0, held: float = 0.0) -> dict[str, str]:
    return splits.assign(clips, speakers=speakers, held=held, seed=1)


def test_the_split_is_by_identity_and_stable() -> None:
    clips = [clip(f"{s}{i}", f"s{s}") for s in range(10) for i in range(3)]
    split = assigned(clips, 0.3)
    held = {c.speaker for c in clips if split[c.key] == "heldout"}
    assert len(held) == 3
    assert held.isdisjoint(c.speaker for c in clips if split[c.key] == "train")
    assert assigned(clips[::-1], 0.3) == split


def test_one_identity_is_never_held_out_and_a_rows_split_is_its_own() -> None:
    assert set(assigned([clip("a", "s"), clip("b", "s")], 0.5).values()) == {"train"}
    marked = [clip("a", "s", "heldout"), clip("b", "s"), clip("c", "t")]
    assert assigned(marked) == {"a": "heldout", "b": "train", "c": "train"}
    parts = [replace(clip(key, "s", split), video=CLIP) for key, split in (("a", "heldout"), ("b", "train"))]
    with pytest.raises(DataError, match="both splits"):
        assigned(parts)


@pytest.mark.parametrize(("held", "count"), [(3, 3), (0.25, 3), (100, 11)])
def test_recordings_of_one_person_are_held_out_whole(held: float, count: int) -> None:
    """Two parts of every file, which stay together."""
    clips = [clip(f"{n}{part}", "s", file=f"{n}.mp4") for n in range(12) for part in "ab"]
    split = assigned(clips, 0.9, held)
    chosen = {c.key[:-1] for c in clips if split[c.key] == "heldout"}
    assert len(chosen) == count
    assert all(split[f"{n}a"] == split[f"{n}b"] for n in range(12))


def film(path: Path, times: list[float], sound_start: float | None = None, size: tuple[int, int] = (64, 48)) -> Path:
    """Frames whose red value counts up, shown at the given times; a click at the start of the sound."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=90, options={"crf": "0", "bf": "0"})
        video.width, video.height, video.pix_fmt = *size, "yuv444p"
        video.codec_context.time_base = video.time_base = Fraction(1, 1000)
        # Both streams before the first packet: the header is written with it.
        audio: Any = container.add_stream("pcm_s16le", rate=48000, layout="mono") if sound_start is not None else None
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number * 4, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(time * 1000), video.time_base
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound_start is not None:
            wave = np.zeros((1, 48000), np.int16)
            wave[0, :480] = 20000
            frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
            frame.sample_rate, frame.pts = 48000, round(sound_start * 48000)
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def test_variable_frame_rates_are_resampled_by_time(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 0.2, 0.24, 0.28, 0.32, 0.36, 0.40, 0.44]
    path = film(tmp_path / "v.mkv", times)
    found = media.read_pixels(path, media.Part(bucket=Bucket(64, 32, 9), fps=25.0))
    shown = (found[:, 0, 0, 0].float() / 4).round().int().tolist()
    assert shown == [0, 1, 2, 2, 2, 3, 4, 5, 6]


def test_late_sound_stays_late(tmp_path: Path) -> None:
    path = film(tmp_path / "v.mkv", [i / 25 for i in range(12)], sound_start=0.1)
    found = media.read_clip(path, media.Part(bucket=Bucket(64, 32, 9), fps=25.0))
    assert found.waveform is not None
    assert found.waveform.shape == (1, round(9 / 25 * 48000))
    loud = found.waveform[0].abs() > 0.3
    assert int(loud.nonzero()[0]) == pytest.approx(0.1 * 48000, abs=60)


def test_cover_and_centre_crop(tmp_path: Path) -> None:
    path = film(tmp_path / "v.mkv", [i / 25 for i in range(10)], size=(96, 32))
    assert media.read_pixels(path, media.Part(bucket=Bucket(32, 32, 9), fps=25.0)).shape == (9, 32, 32, 3)


def test_the_bucket_is_the_nearest_shape_the_clip_is_long_enough_for() -> None:
    buckets = [Bucket(64, 64, 9), Bucket(64, 64, 33), Bucket(128, 64, 33), Bucket(64, 64, 121)]
    assert media.choose_bucket(CLIP, buckets, 1.4, fps=25, width=100, height=100) == Bucket(64, 64, 33)
    assert media.choose_bucket(CLIP, buckets, 1.4, fps=25, width=200, height=100) == Bucket(128, 64, 33)
    assert media.choose_bucket(CLIP, buckets, 0.5, fps=25, width=200, height=100) == Bucket(64, 64, 9)
    with pytest.raises(DataError, match="shortest bucket needs 9 frames"):
        media.choose_bucket(CLIP, buckets, 0.1, fps=25, width=1, height=1)


def test_files_that_are_no_clips(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"x\.mp4 cannot be decoded"):
        media.read_clip(tmp_path / "x.mp4", media.Part(bucket=Bucket(64, 64, 9), fps=25.0))
    (tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"cut\.mp4"):
        media.read_clip(tmp_path / "cut.mp4", media.Part(bucket=Bucket(64, 64, 33), fps=25.0))
    with pytest.raises(DataError, match=r"x\.mp4: its sound cannot be decoded"):
        sound.read_audio(tmp_path / "x.mp4")


def test_loudness() -> None:
    assert rms_db(torch.zeros(1, 10)) == -120
    assert rms_db(torch.ones(1, 10)) == 0
    wave = torch.zeros(1, 1000)
    wave[:, 600:700] = 1
    window = loudest_window(wave, 100, 2.0)
    assert window is not None
    assert float(window.sum()) == 100
    assert loudest_window(wave, 100, 11.0) is None


def test_the_index_addresses_every_tensor(prepared: Path) -> None:
    found = index.load(prepared)
    reader = Reader(prepared, found, seed=1, request=ReadRequest.of([Mode(conditions=[A_VOICE])]))
    assert {r.split for r in found.records} == {"train", "heldout"}
    for record in found.records:
        tensors = reader.tensors(record)
        assert tensors[VIDEO].shape == (16, 5, 2, 2)
        assert tensors[AUDIO].shape == (2, 33, 16)
        assert tensors[AUDIO].dtype == torch.float32
        assert tensors[VOICE].shape[1] == 26


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_our_shards(prepared: Path) -> None:
    found = index.load(prepared)
    urls = [str(prepared / "shards" / s.name) for s in found.shards]
    documented = (REPOSITORY / "data" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(documented, names)
    read = list(names["samples"](webdataset.WebDataset(urls, shardshuffle=False)))
    assert [facts["key"] for facts, _ in read] == [r.key for r in found.records]
    assert {facts["speaker"] for facts, _ in read} == {r.speaker for r in found.records}
    reader = Reader(prepared, found, seed=0)
    for (_, tensors), record in zip(read, found.records, strict=True):
        expected = {**reader.tensors(record), **reader.context(record)}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_references_come_from_other_clips_of_the_speaker(prepared: Path) -> None:
    found = index.load(prepared)
    reader = Reader(prepared, found, seed=1, request=ReadRequest.of([Mode(conditions=[A_VOICE])]))
    chosen: set[str] = set()
    for draw in range(12):
        for record in found.records:
            key = reader.reference_key(Address(record.key, draw), A_VOICE)
            assert key != record.key
            assert reader.records[key].speaker == record.speaker
            others = reader.others(Address(record.key, draw), 3)
            assert others
            assert all(reader.records[k].speaker != record.speaker for k in others)
            assert all(reader.records[k].split == record.split for k in others)
            chosen.add(key)
    assert chosen == {r.key for r in found.records}


def test_unchanged_clips_are_not_encoded_again(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no encoder is even loaded."""
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    before = index.load(root)
    loaded: list[str] = []
    for name in ("load_video_vae", "load_audio_vae", "load_text_connectors"):
        original = getattr(loaders, name)
        monkeypatch.setattr(loaders, name, lambda *a, n=name, o=original, **k: (loaded.append(n), o(*a, **k))[1])
    assert command("prepare", *settings(root, clips)) == 0
    assert "0 clips encoded, 16 unchanged" in capsys.readouterr().out
    assert index.load(root) == before
    assert not loaded
    extended = tmp_path / "clips"
    shutil.copytree(clips, extended)
    rows = json.loads((extended / "CAPTIONS.json").read_text())
    shutil.copy(REPOSITORY / "data/sample/speaker20_0.mp4", extended / "new.mp4")
    rows["captions"].append({"file": "new.mp4", "caption": "x", "speaker": "speaker00"})
    (extended / "CAPTIONS.json").write_text(json.dumps(rows))
    assert command("prepare", *settings(root, extended)) == 0
    assert "1 clips encoded, 16 unchanged" in capsys.readouterr().out


def test_a_changed_setting_or_model_makes_data_stale(
    prepared: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change in ("data.reference_s=0.6", "data.caption=other", "data.fps=24", "model.text_tokens=256"):
        assert command("check", *settings(prepared, clips), change, "check.previews=0") == 78
        assert "stale" in capsys.readouterr().out
    other = ("model.weights=random", "model.seed=5")
    assert command("fit", *settings(prepared, clips), *other, "run.id=never") == 78
    assert "the video VAE was" in capsys.readouterr().err


def test_bad_clips_stop_or_are_set_aside(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "clips"
    shutil.copytree(clips, source)
    (source / "speaker00_0.mp4").write_bytes(b"broken")
    film(tmp_path / "mute.mkv", [i / 25 for i in range(40)]).rename(source / "speaker01_0.mp4")
    assert command("prepare", *settings(tmp_path / "data", source)) == 78
    assert "data.on_bad_clip=skip" in capsys.readouterr().err
    assert not (tmp_path / "data" / "index.safetensors").exists()
    assert command("prepare", *settings(tmp_path / "data", source), "data.on_bad_clip=skip") == 0
    found = index.load(tmp_path / "data")
    assert set(found.quarantined) == {"speaker00_0", "speaker01_0"}
    assert "has no sound" in found.quarantined["speaker01_0"]
    skipping = ("data.on_bad_clip=skip", "check.previews=0", "mode=t2av")
    assert command("check", *settings(tmp_path / "data", source), *skipping) == 0
    assert "set aside by prepare: speaker00_0" in capsys.readouterr().out


def test_check_sees_spoiled_samples(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A speaker in both splits is named; a flipped byte and a truncated shard are errors with a name."""
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    loaded = index.load(root)
    victim = loaded.split("heldout")[0]
    moved = Rows.of([replace(r, split="train") if r == victim else r for r in loaded.records])
    index.save(replace(loaded, records=moved), root)
    assert command("check", *settings(root, clips), "check.previews=0") == 0
    assert f"clips of {victim.speaker} are in both splits" in capsys.readouterr().out
    index.save(loaded, root)
    shard = next((root / "shards").glob("train*"))
    whole = bytearray(shard.read_bytes())
    whole[loaded.split("train")[0].tensors.offset + 1000] ^= 1
    shard.write_bytes(whole)
    assert command("check", *settings(root, clips), "check.previews=0") == 78
    assert "do not match the index" in capsys.readouterr().out
    shard.write_bytes(whole[:-512])
    assert command("check", *settings(root, clips), "check.previews=0") == 78
    assert "bytes instead of" in capsys.readouterr().out
