"""The guides from footage to a LoRA: every command in them runs, in their order, with the tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch

from ltx_train.data.prepare.sound import read_audio
from ltx_train.sampling import media
from tests.conftest import REPOSITORY, command, cut
from tests.endpoint import serving
from tests.faults.test_cut import talk
from tests.unit.test_two_stages import network

pytestmark = pytest.mark.slow
GUIDES = ("character", "voice-identity", "talking-avatar", "quickstart")
TWINS = {
    "talking_head_22b": "av_lora", "voice_reference_22b": "audio_reference", "audio_to_video_22b": "audio_to_video",
}  # fmt: skip
# What makes a command short, by command. Everything else stays as it is written.
SHORT = {
    "prepare": ("data.buckets=[64x64x33]", "data.reference_s=0.5", "data.heldout_speakers=0.4"),
    "fit": (
        "optim.steps=2", "optim.batch_size=1", "eval.interval=2", "checkpoint.interval=2", "sample.steps=2",
        "eval.quantiles=1", "eval.sigmas=[0.5]", "memory.keep=everything", "eval.max_samples=2",
    ),
    "evaluate": ("eval.max_samples=2",),
    "evaluate swap": ("swap.speakers=2", "swap.strengths=[]", "sample.steps=2"),
    "check": ("check.previews=1",),
}  # fmt: skip
LEFT_OUT = ("model.text_encoder",)
# The tiny clips last 1.3 seconds, and there are few of them.
REPLACED = {
    "cut.shortest_s": "1.33", "cut.longest_s": "4", "data.heldout_clips": "1", "sample.audio_start": "0.2",
}  # fmt: skip


def commands(page: str) -> list[str]:
    """The lines of a guide that start with `ltx-train`, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / f"{page}.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("ltx-train ")]


def translated(line: str, endpoint: str) -> list[str]:
    """The words of a line for the tiny model: other recipe, weights and sizes, and few steps."""
    for recipe, twin in TWINS.items():
        line = line.replace(recipe, twin)
    line = re.sub(r"\b\d{3,4}x\d{3,4}x\d+\b", "128x64x33", line)
    words = [word for word in shlex.split(line, comments=True)[1:] if word.partition("=")[0] not in LEFT_OUT]
    replaced = {**REPLACED, "model.path": str(cut(1)), "caption.url": endpoint}
    words = [f"{n}={replaced[n]}" if (n := word.partition("=")[0]) in replaced else word for word in words]
    name = " ".join(words[:2]) if words[:2] == ["evaluate", "swap"] else words[0]
    # The page's reader has no weights yet at this line, which `doctor` reports by an exit code of its own.
    weights = [f"model.path={cut(1)}"] if name == "doctor" else []
    return [*words, *weights, *SHORT.get(name, ())]


@pytest.fixture
def workplace(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guides assume to lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    sample = REPOSITORY / "data/sample"
    talk(tmp_path / "talk.mp4", [f"speaker0{n}_{k}" for n in range(2) for k in range(2)])
    rows = "".join(f"{path},{path.stem.rpartition('_')[0]}\n" for path in sorted(clips.glob("*.mp4")))
    (tmp_path / "speakers.csv").write_text(f"video,speaker\n{rows}")
    sound, rate = read_audio(sample / "speaker01_0.mp4", 0.0, 1.3)
    assert sound is not None
    for name in ("voice.wav", "speech.wav"):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((sound[0].clamp(-1, 1) * 32767).short().numpy().tobytes())
    (tmp_path / "face.jpg").write_bytes(media.jpeg(torch.full((64, 64, 3), 120, dtype=torch.uint8)))
    network(tmp_path / "ltx-2.3-spatial-upscaler-x2-1.1.safetensors")
    return tmp_path


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_runs_from_its_first_line_to_its_last(
    page: str, workplace: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = commands(page)
    assert len(lines) > 6
    with serving() as model:
        for line in lines:
            words = translated(line, model.url)
            _bring(words, workplace, clips)
            code = watched(words) if words[0] == "watch" else command(*words)
            assert code == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
    for name in re.findall(r"`(\w+\.html)`", (REPOSITORY / "docs" / f"{page}.md").read_text()):
        assert list(workplace.rglob(name)), name


def _bring(words: list[str], workplace: Path, clips: Path) -> None:
    """Files that a guide has from elsewhere: a folder of clips, and the distilled LoRA."""
    if words[0] == "prepare" and not (workplace / "clips").exists():
        shutil.copytree(clips, workplace / "clips")
    for word in words:
        name, _, file = word.partition("=")
        if name == "sample.distilled_lora" and not Path(file).exists():
            assert command("export", "runs/audio_to_video/avatar", f"export.out={file}") == 0


def watched(words: list[str]) -> int:
    """`watch` runs until Ctrl-C: until its first line has come."""
    with subprocess.Popen(
        [sys.executable, "-m", "ltx_train", *words, "watch.port=0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "127.0.0.1" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=60)
