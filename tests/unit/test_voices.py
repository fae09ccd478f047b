"""Variants of voice windows: what they change, and that the correct and the wrong reference share them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import Condition, ConditionKind, Exit
from ltx_train.data import index as indexes
from ltx_train.data.order import Address
from ltx_train.data.prepare import voices
from ltx_train.data.reader import Reader, ReadRequest
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command, settings

RATE, ALL = 16_000, list(voices.CHANGES)
# Three tones: two in a telephone's band.
TONES = torch.stack([sum(torch.sin(torch.arange(2 * RATE) * 6.2831853 * f / RATE) for f in (300, 1500, 6000))] * 2) / 8


def level(waveform: torch.Tensor) -> float:
    return 10 * float(waveform.square().mean().log10())


@pytest.mark.parametrize("name", ALL)
def test_a_change_is_the_same_everywhere_and_keeps_the_shape(name: str) -> None:
    made = voices.changed(name, TONES, RATE, "a")
    assert made.shape == TONES.shape
    assert made.isfinite().all()
    assert not torch.equal(made, TONES)
    assert torch.equal(made, voices.changed(name, TONES, RATE, "a"))


@pytest.mark.parametrize("name", ALL)
def test_silence_stays_silent(name: str) -> None:
    assert not voices.changed(name, torch.zeros(1, RATE), RATE, "a").any()


@pytest.mark.parametrize(("name", "below_db"), [("noise", 15), ("music", 10)])
def test_a_background_is_so_far_below_the_voice(name: str, below_db: float) -> None:
    background = voices.changed(name, TONES, RATE, "a") - TONES
    assert level(TONES) - level(background) == pytest.approx(below_db, abs=0.1)
    assert any(not torch.equal(voices.changed(name, TONES, RATE, key) - TONES, background) for key in "bcdef")


def test_a_telephones_band_keeps_what_is_in_it() -> None:
    spectrum = torch.fft.rfft(voices.changed("lowpass", TONES, RATE, "a"))[0].abs()
    expected = torch.fft.rfft(TONES)[0].abs()
    assert [float(spectrum[2 * f] / expected[2 * f]) for f in (300, 1500)] == pytest.approx([1, 1], abs=1e-3)
    assert float(spectrum[2 * 6000] / expected[2 * 6000]) < 1e-3


def test_gains_are_spread_and_never_clip() -> None:
    gains = [level(voices.changed("gain", TONES / 10, RATE, str(key))) - level(TONES / 10) for key in range(200)]
    assert min(gains) < -9
    assert max(gains) > 9
    assert max(map(abs, gains)) <= 12.01
    assert max(float(voices.changed("gain", TONES, RATE, str(key)).abs().max()) for key in range(50)) <= 1


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Eight clips of four people with two variants of every voice, and the settings of the folder."""
    clips, root = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("varied") / "data"
    rows = json.loads((REPOSITORY / "data/sample/CAPTIONS.json").read_text())["captions"]
    kept = [row for row in rows if int(row["speaker"][-2:]) < 4]
    for row in kept:
        shutil.copy(REPOSITORY / "data/sample" / row["file"], clips)
    (clips / "CAPTIONS.json").write_text(json.dumps({"captions": kept}))
    given = settings(root, clips, "data.voice_variants=[noise,lowpass]", "data.heldout_speakers=0.5")
    assert command("prepare", *given) == 0
    return root, given


def reader(root: Path, share: float) -> Reader:
    request = ReadRequest(references={"voice": Condition(kind=ConditionKind.reference)})
    request = replace(request, voice_variants=("noise", "lowpass"), voice_variant_share=share)
    return Reader(root, indexes.load(root), seed=1, request=request)


@pytest.mark.slow
def test_correct_and_wrong_references_share_a_variant(varied: tuple[Path, list[str]]) -> None:
    root, _ = varied
    half = reader(root, 0.5)
    condition = Condition(kind=ConditionKind.reference)
    seen: list[str] = []
    for key in half.records:
        for draw in range(40):
            address = Address(key, draw)
            donor, (wrong,) = half.reference_key(address, condition), half.others(address, 1)
            for sample, whose in ((half.sample(address), donor), (half.with_references_of(address, wrong), wrong)):
                tensors = half.tensors(half.records[whose])
                names = [n for n, t in tensors.items() if torch.equal(t, sample.references["voice"])]
                seen += names
            assert seen[-1] == seen[-2]
    assert set(seen) == {"voice_latent", "voice_latent.noise", "voice_latent.lowpass"}
    assert seen.count("voice_latent") / len(seen) == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_without_variants_nothing_changes(varied: tuple[Path, list[str]]) -> None:
    root, _ = varied
    none = reader(root, 0.0)
    for key, record in none.records.items():
        donor = none.reference_key(Address(key, 0), Condition(kind=ConditionKind.reference))
        found = none.sample(Address(key, 0)).references["voice"]
        assert torch.equal(found, none.tensors(none.records[donor])["voice_latent"])
        assert set(none.tensors(record)) >= {"voice_latent", "voice_latent.noise", "voice_latent.lowpass"}


@pytest.mark.slow
def test_a_run_trains_on_variants_and_is_measured_on_one(varied: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, given = varied
    common = [*given, f"run.root={tmp_path}", "optim.steps=2", "eval.interval=2", "data.workers=0"]
    losses: list[float] = []
    for name, more in (
        ("plain", []), ("varied", ["data.voice_variant_share=1"]), ("noisy", ["eval.voice_variant=noise"]),
    ):  # fmt: skip
        assert command("fit", *common, *more, f"run.id={name}") == 0
        row = read_rows(tmp_path / "audio_reference" / name / "metrics.jsonl")[-1]
        losses.append(row["val/loss"])
        assert "val/reference_gap" in row
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["data.voice_variants=[noise,music]"], Exit.DATA, "data.voice_variants was ['noise', 'lowpass'], now"),
        (["data.voice_variants=[]", "data.voice_variant_share=0.5"], Exit.CONFIG, "needs data.voice_variants"),
        (["eval.voice_variant=music"], Exit.CONFIG, "eval.voice_variant=music"),
        (["data.voice_variants=[reverb]"], Exit.CONFIG, "reverb"),
        (["mode=t2av", "eval.voice_variant=noise"], Exit.CONFIG, "is for modes with a voice reference"),
    ],
)
def test_what_the_folder_does_not_have_is_refused(
    more: list[str], code: int, message: str, varied: tuple[Path, list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, given = varied
    assert command("fit", *given, f"run.root={tmp_path}", *more) == code
    assert message in capsys.readouterr().err


def test_a_folder_with_variants_serves_a_run_without(varied: tuple[Path, list[str]]) -> None:
    _, given = varied
    assert command("check", *given, "data.voice_variants=[]", "check.previews=0") == 0
