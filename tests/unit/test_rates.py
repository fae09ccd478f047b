"""Clips of one person at their own frame rates: from files to batches, steps, held-out clips and verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ltx_train import config
from ltx_train.contracts import ConfigError
from ltx_train.data import index
from ltx_train.data.collate import collate
from ltx_train.data.module import training_order
from ltx_train.data.prepare.media import Part, read_clip
from ltx_train.data.reader import AUDIO, Reader
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import Sound, write_mp4
from tests.conftest import command, settings

RATES = (24000 / 1001, 24.0, 30.0, 50.0)
PEOPLE = 4


@pytest.fixture(scope="module")
def rated(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Each of four rates in four clips, prepared; and the settings."""
    source, root = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("rates") / "data"
    for person in range(PEOPLE):
        media = read_clip(clips / f"speaker{person:02}_0.mp4", Part(bucket=Bucket(64, 64, 33), fps=25.0))
        assert media.waveform is not None
        for number, rate in enumerate(RATES):
            wave = media.waveform.roll(3000 * number, 1).repeat(1, 2)[:, : round(33 / rate * media.rate)]
            write_mp4(source / f"{person}_{number}.mp4", media.pixels, Sound(wave, media.rate), rate)
            (source / f"{person}_{number}.txt").write_text("x")
    words = [
        *settings(root, source), "mode=t2av", "data.fps=source", "data.heldout_clips=4", "data.heldout_speakers=0",
        "data.reference_s=0.5",
    ]  # fmt: skip
    assert command("prepare", *words) == 0
    return root, words


@pytest.mark.slow
def test_every_clip_keeps_its_rate_and_batches_share_a_length(rated: tuple[Path, list[str]]) -> None:
    found = index.load(rated[0])
    reader = Reader(rated[0], found, seed=0)
    for record in found.records:
        rate = RATES[int(record.key[-1])]
        assert record.fps == pytest.approx(rate, rel=1e-6)
        assert record.seconds == pytest.approx(33 / rate)
        assert reader.tensors(record)[AUDIO].shape[1] == round(25 * 33 / rate)
    assert len(found.split("heldout")) == 4
    assert found.by_clip
    order = training_order(found, 2, 1)
    seen: set[str] = set()
    for step in range(order.batches_per_epoch):
        batch = collate([reader.sample(address) for address in order.batch(step)])
        assert torch.allclose(batch.fps, torch.tensor([RATES[int(key[-1])] for key in batch.keys]))
        seen |= set(batch.keys)
    assert seen == {record.key for record in found.split("train")}, "no sample is dropped by its rate"


@pytest.mark.slow
def test_a_run_on_them_is_measured_by_recording(
    rated: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, words = rated
    run = [
        *words, f"run.root={tmp_path}", "optim.steps=4", "optim.batch_size=2", "eval.interval=2", "eval.batch_size=4",
        "checkpoint.interval=4", "eval.samples=0", "optim.warmup=0",
    ]  # fmt: skip
    assert command("check", *words, "check.previews=0") == 0
    assert "are in both splits: held-out losses tell whether clips are memorised" in capsys.readouterr().out
    assert command("fit", *run) == 0
    assert command("evaluate", *run) == 0
    said = capsys.readouterr().out
    assert "Held out are recordings of people who are also trained on" in said
    measured = [json.loads(line) for line in (tmp_path / "audio_reference/main/heldout.jsonl").read_text().splitlines()]
    held = {record.recording for record in index.load(root).split("heldout")}
    assert all(set(row["loss"]) == held for row in measured)


@pytest.mark.parametrize(("text", "value"), [("source", "source"), ("24", 24), ("23.976", 23.976)])
def test_a_rate_is_a_number_or_the_word(text: str, value: object) -> None:
    made = config.compose_config([f"data.fps={text}"])
    assert made.data.fps == value
    assert config.fixed_fps(made) == (None if text == "source" else float(text))
    assert config.counted_fps(made) == (24.0 if text == "source" else float(text))


@pytest.mark.parametrize("text", ["sauce", "0", "true", "[25]"])
def test_another_word_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.fps"):
        config.compose_config([f"data.fps={text}"])
