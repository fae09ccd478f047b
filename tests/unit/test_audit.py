"""What `check` must see inside samples: numbers, shapes, alignment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import Condition, ConditionKind, ModalityName, Mode
from ltx_train.data import index
from ltx_train.data.audit import DataRequirements, audit
from ltx_train.data.columns import Rows
from ltx_train.data.findings import conversions
from ltx_train.data.reader import AUDIO, VIDEO, Reader, ReadRequest
from ltx_train.data.record import Record
from tests.packing import repacked

Tensors = dict[str, torch.Tensor]


def spoiled(
    prepared: Path, root: Path, spoil: Callable[[Tensors], object], mode: Mode | None = None,
    weighed: tuple[str, ...] = (),
) -> list[str]:  # fmt: skip
    """The errors of the audit for `mode` after one training sample's tensors were changed and packed again."""
    shutil.copytree(prepared, root)
    found = index.load(prepared)
    reader = Reader(prepared, found, seed=0)
    victim = found.split("train")[0].key

    def tensors(record: Record) -> Tensors:
        read = reader.tensors(reader.records[record.key])
        if record.key == victim:
            spoil(read)
        return read

    made = repacked(root, tensors)
    modes = (mode or Mode(),)
    requirements = DataRequirements(modes, ReadRequest.of(modes, weighed), -60.0)
    return [f.text for f in audit(root, made, requirements, []) if f.error and made.split("train")[0].key in f.text]


def test_conversions_of_preparation_are_named(prepared: Path) -> None:
    """One line for each rate and layout, with the first names. Rounding and drop-frame rates of the same clip rate."""
    found = index.load(prepared)
    assert all(record.source_fps == record.fps == 25 for record in found.records), "the bundled clips fit"
    assert not list(conversions(found))
    rates = [25.0, 25.004, 30.0, 30.0, 23.976, *[60.0] * (len(found.records) - 5)]
    layouts = ["quad", *[""] * (len(found.records) - 1)]
    records = [
        replace(r, source_fps=rate, averaged=layout)
        for r, rate, layout in zip(found.records, rates, layouts, strict=True)
    ]
    texts = [finding.text for finding in conversions(replace(found, records=Rows.of(records)))]
    assert len(texts) == 4
    assert f"1 clip ({records[4].key}) of 23.976 frames a second were converted to data.fps=25" in texts[0]
    assert f"2 clips ({records[2].key}, {records[3].key}) of 30 frames" in texts[1]
    assert texts[2].count(",") >= 5
    assert ", ...)" in texts[2]
    assert texts[3].startswith(f"1 clip ({records[0].key}) with sound in quad")
    assert not any(finding.error for finding in conversions(replace(found, records=Rows.of(records))))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t[VIDEO].view(-1)[3:4].fill_(float("nan")), "video_latent holds numbers that are not finite"),
        (lambda t: t[AUDIO].fill_(0.5), "audio_latent is constant"),
        (lambda t: t.update({AUDIO: t[AUDIO][:, :-2]}), "31 audio latents beside 1.32 s of video, which needs 33"),
        (lambda t: t.update({VIDEO: t[VIDEO][:, 1:]}), "the video latent is [4, 2, 2]"),
        (lambda t: t.pop(AUDIO), "no audio, but the mode needs it"),
    ],
)
def test_a_spoiled_sample_is_named(
    spoil: Callable[[Tensors], object], message: str, prepared: Path, tmp_path: Path
) -> None:
    errors = spoiled(prepared, tmp_path / "data", spoil)
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("stream", "shape", "value", "message"),
    [
        ("video", (33,), 0.0, "not the grid of the video latent"), ("audio", (33,), 0.0, ""),
        ("audio", (5, 2, 2), 0.0, "not the grid of the audio latent"),
        ("audio", (33,), 1.0, "nothing would be left to predict"),
        (None, (33,), 1.0, ""), (None, (4,), 0.0, "not the grid of the video or of the audio latent"),
    ],
)  # fmt: skip
def test_a_mask_must_have_the_grid_of_the_tokens_it_keeps_clean(
    stream: str | None, shape: tuple[int, ...], value: float, message: str, prepared: Path, tmp_path: Path
) -> None:
    """stream None: the mask only weighs the loss."""
    mode = Mode()
    if stream is not None:
        mode.conditions = [Condition(kind=ConditionKind.mask, source="mask", modality=ModalityName(stream))]
    errors = spoiled(
        prepared, tmp_path / "data", lambda t: t.update(mask=torch.full(shape, value)), mode,
        () if stream else ("mask",),
    )  # fmt: skip
    assert len(errors) == bool(message)
    assert all(message in error for error in errors)


def test_an_untouched_copy_has_no_errors(prepared: Path, tmp_path: Path) -> None:
    assert spoiled(prepared, tmp_path / "data", lambda _: None) == []


@pytest.mark.parametrize("number", [0, -1])
def test_a_damaged_context_is_found(number: int, prepared: Path, tmp_path: Path) -> None:
    """Of the caption, and of the dropped caption."""
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    found = index.load(root)
    record = found.records[0]
    path, place = root / "shards" / record.shard, record.contexts[number].offset
    data = bytearray(path.read_bytes())
    data[place + 200] ^= 1
    path.write_bytes(data)
    errors = [f.text for f in audit(root, found, DataRequirements((Mode(),), ReadRequest(), -60.0), []) if f.error]
    # All samples of the shard share the caption.
    assert len(errors) == sum(other.shard == record.shard for other in found.records)
    assert all("a text context of" in text for text in errors)
