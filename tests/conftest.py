"""Fixtures shared by all suites: goldens, a small prepared folder, and the command line in this process."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Two test workers share two cores: more threads than that make every step wait for the other worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL's paths for AVX round float32 differently on every kind of CPU, by up to 4e-6: more than the goldens allow.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `nohup make test` ignores it, in all processes that tests start too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Commands that tests start compile the package once, not each of them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "golden" / "data"
TINY = GOLDEN / "ltx-2.3-tiny.safetensors"
SPEAKERS = 8

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips of the first speakers of data/sample, as a data set of their own."""
    folder = tmp_path_factory.mktemp("clips")
    rows = json.loads((REPOSITORY / "data/sample/CAPTIONS.json").read_text())["captions"]
    kept = [row for row in rows if int(row["speaker"][-2:]) < SPEAKERS]
    for row in kept:
        shutil.copy(REPOSITORY / "data/sample" / row["file"], folder)
    (folder / "CAPTIONS.json").write_text(json.dumps({"captions": kept}))
    return folder


@pytest.fixture(scope="session")
def prepared(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those clips prepared with the golden checkpoint, two identities held out. Read only."""
    root = tmp_path_factory.mktemp("prepared") / "data"
    assert command("prepare", *settings(root, clips)) == 0
    return root


@functools.cache
def cut(blocks: int) -> Path:
    """The golden checkpoint with the first `blocks` of its three blocks, as a file of this process: the time of a step
    goes with their number. The encoders are the same, so the files share prepared data."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp(prefix="ltx-train-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with safe_open(TINY, "pt") as file:
        metadata = file.metadata()
        config = json.loads(metadata["config"])
        left_out = [f".transformer_blocks.{block}." for block in range(blocks, config["transformer"]["num_layers"])]
        tensors = {k: file.get_tensor(k) for k in file.keys() if not any(part in k for part in left_out)}  # noqa: SIM118
    config["transformer"]["num_layers"] = blocks
    save_file(tensors, folder / "tiny.safetensors", {**metadata, "config": json.dumps(config)})
    return folder / "tiny.safetensors"


def settings(root: Path, source: Path, *more: str) -> list[str]:
    """The overrides that the prepared fixture was made with."""
    return [
        "experiment=audio_reference", f"model.path={cut(1)}", f"data.root={root}", f"data.source={source}",
        "data.heldout_speakers=0.4", "logger=local", "eval.quantiles=2", "eval.sigmas=[0.5]", "eval.wrong_references=1",
        "memory.keep=everything",  # recompute costs two fifths of a step; tests of it ask for it
        *more,
    ]  # fmt: skip


def command(*arguments: str) -> int:
    """One command line, in this process."""
    from ltx_train import signals
    from ltx_train.__main__ import run

    # A stopped run ignores further notices until its process ends, which this one does not.
    numbers = signals.STOP
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        return run(list(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
