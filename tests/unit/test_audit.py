"""What `check` must see inside samples: numbers, shapes, alignment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ltx_train.contracts import Mode
from ltx_train.data import index
from ltx_train.data.audit import DataRequirements, audit
from ltx_train.data.index import Record
from ltx_train.data.prepare import pack
from ltx_train.data.reader import AUDIO, VIDEO, Reader, ReadRequest

Tensors = dict[str, torch.Tensor]


def spoiled(prepared: Path, root: Path, spoil: Callable[[Tensors], object]) -> list[str]:
    """The errors of the audit after one training sample's tensors were changed and packed again."""
    shutil.copytree(prepared, root)
    found = index.load(root)
    reader = Reader(root, found, seed=0)
    victim = found.split("train")[0].key

    def data(record: Record) -> bytes:
        tensors = reader.tensors(next(r for r in found.records if r.key == record.key))
        if record.key == victim:
            spoil(tensors)
        return save({k: v.contiguous() for k, v in tensors.items()})

    shards, placed = pack.write_shards(found.records, data, root / "shards", 256)
    made = replace(found, shards=tuple(shards), records=tuple(placed))
    return [f.text for f in audit(root, made, DataRequirements((Mode(),), ReadRequest(), -60.0), []) if f.error]


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


def test_an_untouched_copy_has_no_errors(prepared: Path, tmp_path: Path) -> None:
    assert spoiled(prepared, tmp_path / "data", lambda _: None) == []
