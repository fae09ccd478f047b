"""Encoders within a budget: whole where they fit, streamed and in tiles where they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_train import config
from ltx_train.assembly import encoder_builder, encoder_plan, memory_plan
from ltx_train.contracts import UserError
from ltx_train.data.prepare.media import Part, read_pixels
from ltx_train.diffusion.grid import Bucket
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.planning.cards import CARDS, GIB
from ltx_train.memory.planning.encoding import EncoderSizes, choose, decode_gib, encode_gib, text_gib
from ltx_train.memory.planning.footprint import predict
from ltx_train.memory.planning.sizes import MemoryChoice, TrainedWeights
from ltx_train.model import codecs
from ltx_train.model.loaders import load_video_vae
from tests.conftest import REPOSITORY, TINY

# Gemma-3-12B and the encoders of the 22B, with the bucket of talking_head_22b.
REAL = EncoderSizes(
    text_gib=21.92, largest_text_gib=1.88, connectors_gib=5.91, video_vae_gib=1.35, audio_vae_gib=0.2, vocoder_gib=0.48,
    states_gib=0.367, width=1280, height=704, frames=153,
)  # fmt: skip
MEASURED = json.loads((REPOSITORY / "docs/performance/encoders.json").read_text())
VIDEO_VAE = replace(REAL, video_vae_gib=0.0, audio_vae_gib=0.0, vocoder_gib=0.0)


@pytest.mark.parametrize(
    ("budget", "streams", "encode", "decode"),
    [
        (None, False, None, None), (80.0, False, None, None), (23.0, True, None, None), (15.0, True, 512, 512),
        (8.0, True, 512, 512), (4.9, True, 384, 256), (1.0, True, 256, 256),
    ],
)  # fmt: skip
def test_the_budget_decides(budget: float | None, streams: bool, encode: int | None, decode: int | None) -> None:
    found = choose(REAL, budget)
    assert (found.streams_text, found.encode_tile, found.decode_tile) == (streams, encode, decode)


def _case(row: dict[str, Any]) -> str:
    return f"{'x'.join(map(str, row['size']))}-{row['tile']}"


@pytest.mark.parametrize("row", [row for row in MEASURED if row["what"] == "video VAE"], ids=_case)
def test_the_vae_allocates_what_is_predicted(row: dict[str, Any]) -> None:
    """Beyond its weights, on an H200; encoding: without the pixels, which the measurement had before."""
    width, height, frames = row["size"]
    sizes = replace(VIDEO_VAE, width=width, height=height, frames=frames)
    pixels = 6 * width * height * frames / 2**30
    assert encode_gib(sizes, row["tile"]) - pixels == pytest.approx(row["encode_gib"], rel=0.04)
    assert decode_gib(sizes, row["tile"]) == pytest.approx(row["decode_gib"], rel=0.03)


def test_peaks_of_captions_are_those_that_were_measured() -> None:
    assert text_gib(REAL, streamed=False) == pytest.approx(29.4, rel=0.01)
    assert text_gib(REAL, streamed=True) < 8


@pytest.mark.parametrize(
    ("words", "streams", "encode", "decode"),
    [
        ([], False, None, None),
        (["memory.text=layers", "memory.tiles=on"], True, 512, 512),
        (["memory.budget_gib=0.5"], False, 256, 256),
    ],
)
def test_settings_and_the_budget_reach_the_encoders(
    words: list[str], streams: bool, encode: int | None, decode: int | None, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10)
    made = config.compose_config(
        [f"model.path={TINY}", "data.buckets=[512x512x121]", f"model.text_encoder={tmp_path}", *words]
    )
    found = encoder_plan.here(made, torch.device("cpu"))
    assert (found.streams_text, found.encode_tile, found.decode_tile) == (streams, encode, decode)
    assert encoder_plan.sizes(made).connectors_gib > 0


@pytest.mark.parametrize("row", [row for row in MEASURED if row["what"] == "sample"], ids=lambda row: row["case"])
def test_a_command_that_trains_nothing_needs_what_is_predicted(row: dict[str, Any]) -> None:
    """Reserved memory, and allocated memory without the share that the allocator reserves."""
    made = config.compose_config(
        ["experiment=talking_head_22b", "model.weights=random", "data.source=x", "data.root=y",
         "data.buckets=[1280x704x153]"]
    )  # fmt: skip
    need = memory_plan.need(made)
    choice = MemoryChoice(
        quantize="int8", keep=Keep.inputs, stream_blocks=row["stream_blocks"], offload_inputs=True,
        compiled=row["compile"],
    )  # fmt: skip
    trained = TrainedWeights(parameters=0, moment_bytes=0.0)
    planned = predict(need.size, need.work, trained, choice, card=CARDS[0])
    assert planned.gib == pytest.approx(row["reserved_gib"], rel=0.05)
    allocated = planned.gib - planned.parts["allocator's reserve"] / GIB
    assert allocated == pytest.approx(row["allocated_gib"], rel=0.05)


def test_encoders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = config.compose_config([f"model.path={TINY}", "data.buckets=[1280x704x257]", "memory.budget_gib=0.5"])
    with pytest.raises(UserError, match=r"the encoders need about .* more than memory\.budget_gib=0\.5"):
        encoder_builder.encoders(made)


def test_generated_clips_are_planned_for() -> None:
    """Their decoders take the place of a step's activations; of a step with few of them they add to the peak."""
    made = [
        config.compose_config(
            [
                "experiment=talking_head_22b",
                "model.weights=random",
                "data.source=x",
                "data.root=y",
                f"eval.samples={n}",
                "eval.prompts=null",
            ]
        )
        for n in (0, 1)
    ]
    without, needed = (memory_plan.need(c) for c in made)
    assert without.between == 0
    assert 4.5 < needed.between / GIB < 5.5
    whole = config.changed(made[1], {"memory.tiles": "off"})
    assert memory_plan.need(whole).between > 2 * needed.between
    choice = MemoryChoice(quantize="int8", keep=Keep.inputs, offload_inputs=True)
    for share, more in ((1, False), (64, True)):
        work = replace(needed.work, video=needed.work.video // share)
        peaks = [predict(n.size, work, n.trained, choice, card=CARDS[0], between=n.between) for n in (without, needed)]
        assert (peaks[1].gib > peaks[0].gib) == more
        assert peaks[1].gib - peaks[0].gib < needed.between / GIB


def test_pixels_are_scaled_in_parts_as_at_once() -> None:
    pixels = torch.randint(0, 256, (19, 4, 6, 3), dtype=torch.uint8)
    whole = (pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(torch.bfloat16)
    assert torch.equal(codecs.scaled(pixels, torch.device("cpu"), torch.bfloat16), whole)
    assert torch.equal(codecs.unscaled(codecs.scaled(pixels, torch.device("cpu"), torch.float32)[0]), pixels)


def test_a_vae_in_tiles_shows_the_same_clip() -> None:
    """The trained tiny VAE on a clip of 96 pixels, in tiles of 64: as near to the clip as the whole one."""
    source = REPOSITORY / "data/tiny/ltx-tiny.safetensors"
    whole, tiled = load_video_vae(source), load_video_vae(source, tile=64)
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
