"""Controls, masks and captions that clips bring: from table rows to tensors in shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import DataError, Mode
from ltx_train.data import audit, index
from ltx_train.data.audit import DataRequirements
from ltx_train.data.order import Address
from ltx_train.data.prepare import extras, sources
from ltx_train.data.prepare.media import Part, read_pixels
from ltx_train.data.prepare.pictures import Box, Crop, Framing
from ltx_train.data.reader import AUDIO_MASK, CONTROL, FACE_MASK, VIDEO_MASK, Reader, ReadRequest
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import write_mp4
from tests.conftest import REPOSITORY, command, settings

FRAMES, SIDE = 33, 64
CLIP = "speaker00_0.mp4"


def clip_of(path: Path, pixels: torch.Tensor) -> Path:
    write_mp4(path, pixels, None, 25.0)
    return path


def test_a_place_is_given_only_if_all_of_it_is_white(tmp_path: Path) -> None:
    """White left half for all frames but number 12: that latent frame is not given, the others' left column is."""
    pixels = torch.zeros(FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    pixels[:, :, :32] = 255
    pixels[:, :, 32:40] = 255
    pixels[12, :20, :20] = 0
    mask = extras.video_mask(clip_of(tmp_path / "mask.mp4", pixels), Part(bucket=Bucket(SIDE, SIDE, FRAMES), fps=25.0))
    assert mask.shape == (5, 2, 2)
    assert mask[:, :, 1].sum() == 0
    assert mask[:, 1, 0].tolist() == [1, 1, 1, 1, 1]
    assert mask[:, 0, 0].tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("crop", list(Crop))
@pytest.mark.parametrize(("width", "height"), [(192, 96), (96, 160), (128, 128), (64, 64)])
def test_a_faces_mask_is_where_the_face_comes_to_lie(crop: Crop, width: int, height: int, tmp_path: Path) -> None:
    """A white face on black, through the same decoder, scaling and cropping as any clip."""
    face = Box(0.25, 0.125, 0.75, 0.5)
    pixels = torch.zeros(9, height, width, 3, dtype=torch.uint8)
    pixels[:, height // 8 : height // 2, width // 4 : width * 3 // 4] = 255
    part = Part(bucket=Bucket(SIDE, SIDE, 9), fps=25.0, framing=Framing(crop=crop, face=face))
    seen = read_pixels(clip_of(tmp_path / "face.mp4", pixels), part).float().mean(dim=-1) / 255
    mask = extras.face_mask(part, (width, height))
    assert mask.shape == (2, 2, 2)
    assert torch.equal(mask[0], mask[1])
    assert mask.max() > 0.15
    torch.testing.assert_close(mask[0], torch.nn.functional.avg_pool2d(seen[:1], 32)[0], atol=0.05, rtol=0)


@pytest.mark.parametrize(("spans", "given"), [("0-0.13", [0, 1, 2, 3]), ("0.05-0.13, 1.2-9", [2, 3, 31, 32])])
def test_seconds_become_audio_latents(spans: str, given: list[int]) -> None:
    assert extras.audio_mask(spans, 33, "clip").nonzero().flatten().tolist() == given


@pytest.mark.parametrize("spans", ["0.5", "2-1", "a-b", "0.5.1-1.2", ".-1"])
def test_spans_that_are_none_are_named(spans: str) -> None:
    with pytest.raises(DataError, match="clip: audio_mask"):
        extras.audio_mask(spans, 33, "clip")


def test_captions_come_as_a_list_or_as_columns(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"video": "a.mp4", "caption": ["one", "two"]}]))
    columns = tmp_path / "table.csv"
    columns.write_text("video,caption,caption_2\na.mp4,one,two\n")
    for table in (listed, columns):
        (clip,) = sources.read_source(table)
        assert (clip.caption, clip.captions) == ("one", ("two",))


@pytest.fixture(scope="module")
def rich(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers' clips with a control at half the size, masks, and a second caption, prepared by the command."""
    folder = tmp_path_factory.mktemp("extras")
    white = torch.full((FRAMES, SIDE, SIDE, 3), 255, dtype=torch.uint8)
    white[:, 32:] = 0
    clip_of(folder / "mask.mp4", white)
    rows = json.loads((clips / "CAPTIONS.json").read_text())["captions"][:8]
    # Keys of samples, and with them all draws, come from relative paths: they are the same wherever the folder is.
    (folder / "clips").symlink_to(clips)
    table = [
        {
            "video": f"clips/{row['file']}", "speaker": row["speaker"],
            "caption": [f"{row['speaker']} first", f"{row['speaker']} second"],
            "reference_video": str(REPOSITORY / "data/sample/speaker09_0.mp4"), "mask": "mask.mp4",
            "audio_mask": "0-0.4", "face": "0.5,0,1,0.25",
        }
        for row in rows
    ]  # fmt: skip
    (folder / "table.json").write_text(json.dumps(table))
    root = folder / "data"
    asked = settings(root, folder / "table.json", "data.reference_scale=1", "data.caption_dropout=0.5")
    assert command("prepare", *asked, "data.caption=null", "data.trigger=OHWX") == 0
    return root


@pytest.mark.slow
def test_shards_hold_controls_masks_and_a_second_caption(rich: Path) -> None:
    found = index.load(rich)
    reader = Reader(rich, found, seed=0)
    for record in found.records:
        tensors = reader.tensors(record)
        assert tensors[CONTROL].shape == (16, 5, 2, 2)
        assert tensors[VIDEO_MASK].shape == (5, 2, 2)
        assert tensors[VIDEO_MASK][:, 0].min() == 1
        assert tensors[VIDEO_MASK][:, 1].max() == 0
        assert int(tensors[AUDIO_MASK].sum()) == 10
        assert tensors[FACE_MASK].tolist() == [[[0, 0.5], [0, 0]]] * 5
        assert len(record.variants) == 1
        assert record.variants[0] != record.context


@pytest.mark.slow
def test_the_face_can_weigh_more_in_the_loss(
    rich: Path, prepared: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(rich, rich.parent / "table.json", "data.reference_scale=1", "data.caption=null")
    weighed = ("loss.token_weights={face_mask: 3}", "check.previews=0")
    assert command("check", *asked, "data.trigger=OHWX", *weighed) == 0
    reader = Reader(rich, index.load(rich), seed=0)
    filled = {**reader.tensors(next(iter(reader.records.values()))), FACE_MASK: torch.ones(5, 2, 2)}
    unread = DataRequirements(modes=(Mode(),), request=ReadRequest(), silence_db=-60.0)
    assert not [f for f in audit._sample(reader, index.load(rich).records[0], unread, filled) if "face" in f.text]
    assert command("check", *settings(prepared, clips), *weighed) == 78
    assert "no face_mask in the shards" in capsys.readouterr().out


@pytest.mark.slow
def test_captions_take_turns_and_are_dropped_as_often_as_asked(rich: Path) -> None:
    found = index.load(rich)
    record = found.records[0]
    reader = Reader(rich, found, seed=0, request=ReadRequest(caption_dropout=0.5, variants=True))
    drawn = [reader.caption(Address(record.key, n)) for n in range(400)]
    shares = [drawn.count(number) / 400 for number in (2, 0, 1)]
    assert len(record.contexts) == 3
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=5 * 0.025)
    assert drawn == [reader.caption(Address(record.key, n)) for n in range(400)]
    seen = {c: reader.sample(Address(record.key, drawn.index(c))).video_context for c in set(drawn)}
    assert len({tuple(t.flatten()[:64].tolist()) for t in seen.values()}) == 3
    steady = Reader(rich, found, seed=0)
    assert {steady.caption(Address(record.key, n)) for n in range(20)} == {0}


@pytest.mark.slow
def test_folders_prepared_without_dropping_are_named(
    prepared: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", *settings(prepared, clips), "data.caption_dropout=0.1", "check.previews=0") == 78
    assert "data.dropped_caption was None, now" in capsys.readouterr().out


@pytest.mark.slow
def test_training_with_dropped_captions_measures_what_captions_tell(rich: Path, tmp_path: Path) -> None:
    """Captions take turns and are dropped; the held-out measurement compares each with another identity's."""
    table = rich.parent / "table.json"
    asked = settings(rich, table, "data.reference_scale=1", "data.caption_dropout=0.5", "data.caption=null")
    run = ("data.trigger=OHWX", f"run.root={tmp_path}", "optim.steps=4", "memory=none", "eval.interval=2")
    assert command("fit", *asked, *run) == 0
    rows = [json.loads(line) for line in (tmp_path / "audio_reference/main/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "val/loss" in row]
    assert len(measured) == 2
    for row in measured:
        assert math.isfinite(row["val/caption_gap"])
        assert row["val/caption_gap"] != 0
        assert row["val/caption_gap_ci95"] >= 0
