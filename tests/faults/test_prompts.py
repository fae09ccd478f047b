"""Clips of prompts while a run trains: those of `sample`, whatever is held out, and no reason for a run to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ltx_train import config
from ltx_train.assembly import requests, run_clips
from ltx_train.contracts import ConfigError
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command, settings
from tests.faults.test_deepspeed import decoded
from tests.faults.test_ranks import end, fit

pytestmark = pytest.mark.slow
NAMES = ("base", "step-000004")
CLIP = REPOSITORY / "data/sample/speaker00_0.mp4"
PROMPTS = (
    "eval.prompts=[{prompt: a man, seed: 7, bucket: 64x64x33, without_references: true}, "
    f"{{prompt: a voice, reference_audio: {CLIP}, seed: 8, bucket: 64x64x33}}]"
)
GUIDED = ("sample.steps=2", "sample.video_cfg=3", "sample.audio_cfg=4", "sample.stg_scale=1", "sample.stg_blocks=[0]")


def run(root: Path, name: str = "main") -> Path:
    return root / "audio_reference" / name


def made(folder: Path) -> dict[str, bytes]:
    root = folder / "samples" / "prompts"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.mp4"))}


def test_clips_are_those_of_sample_with_the_same_weights(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the base and of a step, with all guidance, on a run that holds nothing out; and they are on its page."""
    steps = ("optim.steps=4", "eval.interval=2", "eval.sample_interval=4", "optim.lr=0.05", "checkpoint.interval=4")
    assert command(*fit(prepared, clips, tmp_path, *steps, PROMPTS, *GUIDED)) == 0
    folder = run(tmp_path)
    found = made(folder)
    assert list(found) == ["base/01.mp4", "base/02.mp4", "step-000004/01.mp4", "step-000004/02.mp4"]
    assert len(set(found.values())) == 4
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("perf/generate_s", 0) > 0] == [4]
    words = [*fit(prepared, clips, tmp_path)[1:], *GUIDED]
    asked = [["sample.prompt=a man", "sample.seed=7", "sample.without_references=true"],
             ["sample.prompt=a voice", "sample.seed=8", f"sample.reference_audio={CLIP}"]]  # fmt: skip
    weights = folder / "adapters" / "step-000004.safetensors"
    for number, one in enumerate(asked, 1):
        for name, adapter in zip(NAMES, ([], [f"sample.adapter={weights}"]), strict=True):
            out = tmp_path / f"{name}-{number}.mp4"
            assert command("sample", *words, *one, *adapter, f"sample.out={out}") == 0
            mine, other = (folder / f"samples/prompts/{n}/{number:02d}.mp4" for n in (name, *({*NAMES} - {name})))
            # `sample` itself rounds differently from call to call, by where its tensors lie, and H.264 makes pixels of
            # it. The other weights' clip is far away.
            for part, again, else_ in zip(decoded(mine), decoded(out), decoded(other), strict=True):
                assert np.abs(part - again).mean() < 0.1 * np.abs(part - else_).mean(), (name, number)
    assert command("evaluate", str(folder)) == 0
    page = (folder / "report.html").read_text()
    assert page.index("<h3>a man (clip 1, seed 7)</h3>") < page.index("<h3>a voice (clip 2, seed 8)</h3>")
    assert page.count("<figcaption>step 4</figcaption>") == 2


def test_clips_need_no_held_out_data_and_go_on_after_a_stop(prepared: Path, clips: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- a man\n- {prompt: ein Ständchen, seed: 3}\n", encoding="utf-8")
    steps = (
        "sample.without_references=true",
        "eval.interval=0",
        "eval.sample_interval=2",
        "sample.steps=1",
        f"eval.prompts={prompts}",
    )
    assert command(*fit(prepared, clips, tmp_path / "a", "optim.steps=3", *steps, "optim.schedule=constant")) == 0
    folder = run(tmp_path / "a")
    assert {name.partition("/")[0] for name in made(folder)} == {"base", "step-000002", "step-000003"}
    prompts.unlink()  # the run's own settings have them
    assert command("fit", str(folder), "optim.steps=4") == 0
    assert {name.partition("/")[0] for name in made(folder)} == {"base", *(f"step-00000{n}" for n in (2, 3, 4))}
    assert command("export", str(folder), f"eval.prompts={prompts}", f"export.out={tmp_path / 'a.safetensors'}") == 0


def test_ranks_share_the_clips_out(prepared: Path, clips: Path, tmp_path: Path) -> None:
    words = ("optim.lr=0", "optim.steps=1", "eval.interval=1", "sample.steps=1", PROMPTS)
    assert command(*fit(prepared, clips, tmp_path / "one", *words)) == 0
    assert (
        end(fit(prepared, clips, tmp_path / "two", *words, "strategy=ddp", "strategy.devices=2"), tmp_path / "log") == 0
    )
    assert made(run(tmp_path / "two")).keys() == made(run(tmp_path / "one")).keys()


def test_a_failure_costs_the_clips_alone(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(requests, "write", refuse)
    words = ("optim.steps=2", "eval.interval=1", "sample.steps=1", PROMPTS)
    assert command(*fit(prepared, clips, tmp_path, *words)) == 0
    shown = capsys.readouterr().err
    assert shown.count("No space left on device; the run goes on") == 3
    assert len(read_rows(run(tmp_path) / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("[{promt: a man}]", "clip 1: 'promt' is no setting of a clip: take prompt"),
        ("[a man, 7]", "clip 2: a text or a mapping is expected"),
        ("[{prompt: a man, seed: x}]", "clip 1: Value 'x'"),
        ("[{prompt: a man, bucket: 128x64x33}]", "clip 1: bucket 128x64x33 is larger than those of data.buckets"),
        ("[{prompt: a man, bucket: 64x65x33}]", "64x65x33"),
        ("{prompt: a man}", "a list is expected"),
    ],
)
def test_what_makes_no_clip_is_refused(prompts: str, message: str, prepared: Path, clips: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        config.compose_config([*settings(prepared, clips), "sample.without_references=true", f"eval.prompts={prompts}"])
    assert message in str(raised.value)


def test_a_missing_file_is_named_before_anything_is_loaded(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*fit(prepared, clips, tmp_path, "eval.prompts=gone.yaml")) == 77
    assert "eval.prompts=gone.yaml cannot be read" in capsys.readouterr().err
    words = fit(
        prepared, clips, tmp_path, "sample.without_references=true",
        "eval.prompts=[{prompt: x, image: gone.png}, {prompt: y, audio: lost.wav}]",
    )  # fmt: skip
    assert command(*words) == 78
    shown = capsys.readouterr().err
    assert "eval.prompts, clip 1: image=gone.png: there is no such file" in shown
    assert "eval.prompts, clip 2: audio=lost.wav: there is no such file" in shown
    assert not run(tmp_path).exists()
    assert run_clips.found(run(tmp_path) / "samples") == {}


def test_clips_are_small_unless_a_size_is_given() -> None:
    real = ["experiment=talking_head_22b", "data.source=x", "data.root=y"]
    assert [made.sample.bucket for made in config.prompted(config.compose_config(real))] == ["640x352x73"] * 2
    assert [made.sample.video_cfg for made in config.prompted(config.compose_config(real))] == [4.0] * 2
    tiny = config.compose_config([*real, "data.buckets=[96x64x25]", "eval.prompts=[a, {prompt: b, bucket: 96x64x9}]"])
    assert [made.sample.bucket for made in config.prompted(tiny)] == ["32x32x25", "96x64x9"]
