"""Encoders within a budget: whole where they fit, streamed and in tiles where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_train import config
from ltx_train.assembly import encoder_builder
from ltx_train.data.prepare.media import Part, read_pixels
from ltx_train.diffusion.grid import Bucket
from ltx_train.memory.planning.encoding import EncoderSizes, choose
from ltx_train.model import codecs
from ltx_train.model.loaders import load_video_vae
from tests.conftest import REPOSITORY, TINY

# Gemma-3-12B, the connectors of the 22B and the bucket of talking_head_22b.
REAL = EncoderSizes(text_gib=21.9, connectors_gib=5.9, states_gib=0.36, width=1280, height=704, frames=153)


@pytest.mark.parametrize(
    ("budget", "streams", "tiles"),
    [(None, False, False), (80.0, False, False), (23.0, True, False), (15.0, True, True), (11.0, True, True)],
)
def test_the_budget_decides(budget: float | None, streams: bool, tiles: bool) -> None:
    found = choose(REAL, budget)
    assert (found.streams_text, found.tiles) == (streams, tiles)
    assert found.peak_gib < (budget or 99)


def test_peaks_are_those_that_were_measured() -> None:
    """1280x704x153 on an H200: 18.1 GiB whole, 7.9 GiB in tiles."""
    assert choose(REAL, None).video_gib == pytest.approx(18.1, rel=0.01)
    assert choose(REAL, None, tiles=True).video_gib == pytest.approx(7.9, rel=0.01)
    assert choose(REAL, None).text_gib == pytest.approx(28.5, rel=0.01)


@pytest.mark.parametrize(
    ("words", "streams", "tiles"),
    [
        ([], False, False),
        (["memory.text=layers", "memory.tiles=on"], True, True),
        (["memory.budget_gib=0.5"], False, True),
    ],
)
def test_settings_and_the_budget_reach_the_encoders(
    words: list[str], streams: bool, tiles: bool, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10)
    made = config.compose_config(
        [f"model.path={TINY}", "data.buckets=[512x512x121]", f"model.text_encoder={tmp_path}", *words]
    )
    found = encoder_builder.here(made, torch.device("cpu"))
    assert (found.tiles, found.streams_text) == (tiles, streams)
    assert encoder_builder.sizes(made).connectors_gib > 0


def test_a_vae_in_tiles_shows_the_same_clip() -> None:
    """The trained tiny VAE on a clip of 96 pixels, in tiles of 64: as near to the clip as the whole one."""
    source = REPOSITORY / "data/tiny/ltx-tiny.safetensors"
    whole, tiled = load_video_vae(source), load_video_vae(source, tiles=True)
    assert tiled.use_tiling
    assert not whole.use_tiling
    tiled.enable_tiling(64, 64, None, 32, 32)
    clip = REPOSITORY / "data/sample/speaker00_0.mp4"
    pixels = read_pixels(clip, Part(bucket=Bucket(96, 96, 9), fps=25.0)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        errors = [
            float((codecs.decode_video(vae, codecs.encode_video(vae, pixels)) - pixels).square().mean())
            for vae in (whole, tiled)
        ]
    assert errors[1] < 1.5 * errors[0]
