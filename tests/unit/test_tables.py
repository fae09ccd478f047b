"""Data sets in all layouts that their makers have, and every fault of a table in one report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ltx_train.contracts import DataError
from ltx_train.data.prepare.pictures import Box
from ltx_train.data.prepare.sources import UNNAMED, Clip, read_source
from tests.conftest import REPOSITORY

CLIP = REPOSITORY / "data/sample/speaker00_0.mp4"


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLIP, path / name)
    return path


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("rows.csv", ";"), ("rows.csv", "\t"), ("x.tsv", "\t")])
def test_the_delimiter_of_a_table_is_found(tmp_path: Path, name: str, mark: str) -> None:
    folder_of(tmp_path, "ä.mp4")
    rows = [["video", "caption", "speaker"], ["ä.mp4", '"one, two; three"', "Zoë"]]
    (tmp_path / name).write_text("\n".join(mark.join(row) for row in rows), encoding="utf-8-sig")
    (clip,) = read_source(tmp_path / name)
    assert (clip.caption, clip.speaker, clip.key) == ("one, two; three", "Zoë", "ä")


def test_a_table_of_a_windows_program_is_answered_with_the_mend(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.mp4")
    (tmp_path / "rows.csv").write_bytes("video,caption\na.mp4,caf\u00e9 \u2013 bar\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 23\): save it as UTF-8 .*iconv -f cp1252"):
        read_source(tmp_path / "rows.csv")


def test_a_common_caption_replaces_the_column_and_no_caption_of_a_row(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "bare.csv").write_text("video,speaker\na.mp4,anna\n")
    (clip,) = read_source(tmp_path / "bare.csv", "a person is speaking")
    assert clip.caption == "a person is speaking"
    with pytest.raises(DataError, match="needs the columns"):
        read_source(tmp_path / "bare.csv")
    (tmp_path / "own.csv").write_text("video,caption\na.mp4,a man\nb.mp4,\n")
    assert [clip.caption for clip in read_source(tmp_path / "own.csv", "all")] == ["a man", "all"]


@pytest.mark.parametrize("name", ["CAPTIONS.json", "captions.jsonl", "dataset.json", "metadata.csv"])
def test_a_folder_has_its_table_under_a_usual_name(tmp_path: Path, name: str) -> None:
    """With the column names of other trainers."""
    folder_of(tmp_path, "a.mp4", "ref.mp4")
    row = {"media_path": "a.mp4", "text": "x", "ref_media_path": "ref.mp4", "person": "anna"}
    texts = {
        ".json": json.dumps([row]), ".jsonl": json.dumps(row),
        ".csv": ",".join(row) + "\n" + ",".join(row.values()) + "\n",
    }  # fmt: skip
    (tmp_path / name).write_text(texts[Path(name).suffix])
    (clip,) = read_source(tmp_path)
    assert (clip.caption, clip.speaker, clip.files["reference_video"].name) == ("x", "anna", "ref.mp4")


def test_a_text_beside_each_clip_is_its_caption(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.mp4", "deep/b.mp4")
    (tmp_path / "a.txt").write_text("first\n")
    with pytest.raises(DataError, match=r"1 of 2 clips have no text beside them \(deep/b.mp4\)"):
        read_source(tmp_path)
    (tmp_path / "deep/b.txt").write_text("second")
    assert [(c.key, c.caption, c.speaker) for c in read_source(tmp_path)] == [
        ("a", "first", UNNAMED), ("deep_b", "second", UNNAMED),
    ]  # fmt: skip


def test_a_bare_folder_is_answered_with_what_was_found_and_a_skeleton(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{n}.mp4" for n in range(5)))
    with pytest.raises(DataError) as caught:
        read_source(tmp_path)
    said = str(caught.value)
    assert "holds 5 clips without captions" in said
    assert "  video,caption,speaker\n  0.mp4,what is seen and heard,anna\n" in said
    skeleton = [line.strip() for line in said.splitlines() if line.startswith("  ")][:-1]
    (tmp_path / "captions.csv").write_text("\n".join(skeleton))
    assert len(read_source(tmp_path)) == 3
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.wav").touch()
    with pytest.raises(DataError, match=r"holds no clips .* 1 sound files can be listed .* column audio"):
        read_source(tmp_path / "nothing")


def test_all_faults_come_in_one_report(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.mp4", "b.mp4")
    rows = [
        {"video": "a.mp4", "caption": "x", "capton": "y"},
        {"video": "b.mp4"},
        {"video": "a.mp4", "caption": "again"},
        {"video": "gone.mp4", "caption": "x", "split": "test"},
        {"video": "gone2.mp4", "caption": "x"},
        {"video": "b.mp4", "caption": "x", "start": "5", "end": "4"},
        {"video": "b.mp4", "caption": "x", "weight": "-1"},
        {"video": "b.mp4", "caption": "x", "face": "0.5,0,0.2,1"},
        {"video": "b.mp4", "caption": "x", "start": "soon"},
        "b.mp4",
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        read_source(tmp_path / "rows.json")
    said = str(caught.value)
    for part in (
        "has 10 faults", "unknown column 'capton'; did you mean 'caption'", "entry 2: needs the columns",
        "entry 4: split", "a.mp4 is listed more than once", "1 files do not exist: ", "gone2.mp4",
        "entry 6: end=4 is not behind start=5", "entry 7: weight='-1'", "entry 10: an object",
        "entry 8: '0.5,0,0.2,1' is not left,top,right,bottom", "entry 9: start='soon' is no time",
    ):  # fmt: skip
        assert part in said, part


def test_parts_of_a_file_weights_and_faces(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.mp4")
    (tmp_path / "rows.csv").write_text(
        'video,caption,start,end,weight,face\na.mp4,x,0:01.5,1:00:02,0.5,"0.1,0.2,0.3,0.4"\na.mp4,y,3,,,\na.mp4,z,,,2,\n'
    )
    clips = {clip.caption: clip for clip in read_source(tmp_path / "rows.csv")}
    assert [clips[c].key for c in "xyz"] == ["a_1_5s", "a_3s", "a"]
    assert (clips["x"].start, clips["x"].end, clips["x"].weight) == (1.5, 3602.0, 0.5)
    assert clips["x"].face == Box(0.1, 0.2, 0.3, 0.4)
    assert (clips["y"].start, clips["y"].end, clips["z"].weight) == (3.0, None, 2.0)


def test_keys_do_not_depend_on_where_the_footage_lies(tmp_path: Path) -> None:
    """Neither with absolute names inside the table's folder, nor with those of footage elsewhere."""

    def keys(home: Path, inside: bool) -> list[str]:
        folder_of(home / "footage", "one/a.mp4", "two/b.mp4")
        table = home / ("footage" if inside else "tables") / "rows.csv"
        table.parent.mkdir(exist_ok=True)
        rows = [f"{home}/footage/{name},x" for name in ("one/a.mp4", "two/b.mp4")]
        table.write_text("\n".join(["video,caption", *rows]))
        return [clip.key for clip in read_source(table)]

    found = [keys(tmp_path / str(n), inside) for n, inside in enumerate((True, False, True, False))]
    assert found == [["one_a", "two_b"]] * 4


def test_sounds_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.wav")
    (tmp_path / "rows.csv").write_text("audio,caption\na.wav,x\n")
    (clip,) = read_source(tmp_path / "rows.csv")
    assert isinstance(clip, Clip)
    assert clip.video is None
    assert clip.medium == tmp_path / "a.wav"


@pytest.mark.parametrize("name", ["test.mp4", "talk.srt"])
def test_a_file_that_is_no_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x88\x00")
    with pytest.raises(DataError, match="is no table of clips: give its folder"):
        read_source(tmp_path / name)
