"""The whole way on the tiny model, each command as a user runs it, and the method shown to work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_train.model.checkpoint import CheckpointFile
from ltx_train.model.loaders import transformer_original_name
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, TINY, command, settings


@pytest.mark.parametrize(
    ("experiment", "overrides", "tensors"),
    [
        ("av_lora", (), 144),
        ("audio_reference", ("adapter=cross_modal",), 108),
        ("audio_reference", ("adapter=audio_only",), 60),
        # Less than the 144 of all attentions: the last block's bridge into the frozen audio never sees a loss.
        ("audio_to_video", (), 136),
    ],
)
def test_experiments_run(
    experiment: str, overrides: tuple[str, ...], tensors: int, clips: Path, prepared: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    where = [
        f"experiment={experiment}", f"model.path={TINY}", f"data.root={root}", f"data.source={clips}",
        "data.heldout_speakers=0.4", f"run.root={tmp_path}", "optim.steps=3", "eval.interval=3", "logger.every=1",
        *overrides,
    ]  # fmt: skip
    assert command("prepare", *where) == 0
    assert "0 clips encoded" in capsys.readouterr().out
    assert command("fit", *where, "logger=local") == 0
    panel = capsys.readouterr().out
    assert "new run in" in panel
    assert f"{tensors} tensors" in panel
    run = tmp_path / experiment / "main"
    rows = read_rows(run / "metrics.jsonl")
    audio_generated = experiment != "audio_to_video"
    assert all(("train/loss_audio" in row) == audio_generated for row in rows)
    assert all("train/loss_video" in row for row in rows)
    assert ("val/reference_gap" in rows[-1]) == (experiment == "audio_reference")
    assert len(load_file(run / "adapters" / "step-000003.safetensors")) == tensors


def test_the_bundled_clips_show_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's claim, with fewer steps: a base, a voice-reference LoRA on it, new speakers. The base reads the
    reference by itself; an adapter that was never trained takes no credit for that."""
    base = tmp_path / "base.safetensors"
    where = [f"run.root={tmp_path}", f"data.root={tmp_path / 'data'}", "logger=local", "memory=none"]
    few = ["eval.strengths=[]", "eval.repeats=0"]  # test_measuring has those
    lora = [
        "experiment=audio_reference",
        f"model.path={base}",
        "optim.steps=200",
        "optim.lr=1e-3",
        "eval.interval=0",
        *few,
        *where,
    ]
    assert command("prepare", "experiment=audio_reference", *where) == 0
    assert command("fit", "experiment=tiny_base", "optim.steps=150", "eval.interval=0", *where) == 0
    assert command("export", "experiment=tiny_base", f"export.out={base}", *where) == 0
    assert command("fit", *lora) == 0
    assert command("evaluate", *lora, "eval.interval=0") == 0
    row = read_rows(tmp_path / "audio_reference" / "main" / "metrics.jsonl")[-1]
    assert row["val/gained_gap"] + row["val/gained_gap_ci95"] < 0
    assert row["val/gained_gap"] == pytest.approx(row["val/reference_gap"] - row["val/base_gap"], abs=1e-6)
    assert row["val/adapter_gain"] < 0
    capsys.readouterr()
    untrained = [*lora, "run.id=untrained", "optim.lr=0", "optim.final_lr=0", "optim.warmup=0", "optim.steps=1"]
    assert command("fit", *untrained) == 0
    assert command("evaluate", *untrained) == 0
    shown = capsys.readouterr().out
    assert "The base uses the reference by itself. The adapter shows no use of its own" in shown
    assert "Gained gap: +0.0000 ± 0.0000" in shown
    assert "nan" not in shown


def test_every_command_names_the_next_one(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a prepared folder to a clip by typing what the command before has printed. Folders replace all overrides;
    settings that a command does not read never make it refuse."""
    small = {
        "check": ["check.previews=0"],
        "fit": [f"run.root={tmp_path}", "optim.steps=2", "eval.interval=2", "adapter=attention"],
        "evaluate": ["data.on_bad_clip=skip", "data.workers=1", "logger.every=3", "sweep.trials=7"],
        "sample": [
            "sample.prompt=a man, close: {calm}",
            "sample.without_references=true",
            "sample.steps=1",
            f"sample.out={tmp_path / 'clip.mp4'}",
        ],
    }
    following = ["check", str(prepared)]
    typed: list[str] = []
    while "sample" not in typed:
        typed.append(following[0])
        assert command(*following, *small.get(following[0], [])) == 0, following
        *_, last = capsys.readouterr().out.splitlines()
        assert last.startswith("next: ltx-train "), last
        following = last.split()[2:]
    assert typed == ["check", "fit", "evaluate", "export", "inspect", "sample"]
    assert following[0] == "sample"
    assert following[-1] == "sample.seed=43"
    assert (tmp_path / "clip.mp4").stat().st_size > 1000


@pytest.fixture
def _kernels() -> Generator[None]:
    """Restores the choice of kernels, which belongs to the process: later tests compare with other processes bit for
    bit."""
    sdp = torch.backends.cuda
    names = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp")
    before = {name: getattr(sdp, f"{name}_enabled")() for name in names}
    variable = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    for name, value in before.items():
        getattr(sdp, f"enable_{name}")(value)
    if variable is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("option", ["fast", "limit", "overfit", "deterministic", "profile"])
def test_debug_configurations_run(option: str, prepared: Path, tmp_path: Path) -> None:
    more = ["optim.steps=10"] if option in ("overfit", "deterministic") else []
    arguments = ["fit", str(prepared), f"debug={option}", f"run.root={tmp_path}", *more, "optim.lr=0.01"]
    assert command(*arguments) == 0
    run = next((tmp_path / "audio_reference").iterdir())
    assert run.name.startswith("debug")
    rows = read_rows(run / "metrics.jsonl")
    if option == "limit":
        assert len([row for row in rows if "val/loss" in row]) == 2
    if option == "overfit":
        assert (run / "config.yaml").read_text().count("limit: 1\n") == 1
    if option == "deterministic":
        assert torch.are_deterministic_algorithms_enabled()
    if option == "profile":
        assert "traceEvents" in json.loads((run / "profile" / "rank-0.json").read_text())


@pytest.fixture(scope="module")
def trained(prepared: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of six steps with alpha twice the rank, and its overrides."""
    root = tmp_path_factory.mktemp("runs")
    overrides = settings(
        prepared, clips, f"run.root={root}", "optim.steps=6", "eval.interval=6", "logger.every=2", "adapter.alpha=64",
        "checkpoint.interval=3", "optim.lr=0.01",
    )  # fmt: skip
    assert command("fit", *overrides) == 0
    return root / "audio_reference" / "main", overrides


def test_evaluate_gives_the_numbers_of_fit(trained: tuple[Path, list[str]]) -> None:
    run, overrides = trained
    rows = read_rows(run / "metrics.jsonl")
    during = next(row for row in reversed(rows) if "train/loss" in row)
    assert command("evaluate", *overrides) == 0
    after = read_rows(run / "metrics.jsonl")[-1]
    names = [name for name in during if name.startswith("val/")]
    assert len(names) > 10
    assert [after[n] for n in names] == [during[n] for n in names]
    page = (run / "report.html").read_text()
    assert "Gained gap: " in page
    assert page.count("data:image/svg") == 7
    for fact in ("started", "learning rate", "6 of 6 steps in", "1 x CPU", "people who are not trained on", "seed"):
        assert fact in page, fact
    assert "Measured again with other noise" in page


def test_every_metric_is_documented(trained: tuple[Path, list[str]]) -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    names = {name for row in read_rows(trained[0] / "metrics.jsonl") for name in row} - {"step"}
    assert len(names) > 20
    for name in names:
        stem = name.rpartition("/")[0] + "/<" if name.count("/") == 2 else name
        plain = name.removesuffix("_ci95")
        assert f"`{stem}" in text or (plain != name and f"`{plain}`" in text), name


def test_export_and_inspect(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """alpha / rank = 2 is folded in; the file gives the trainer's own output; each broken file has its own error."""
    run, overrides = trained
    file = tmp_path / "lora.safetensors"
    assert command("export", *overrides, f"export.out={file}") == 0
    proof = [*overrides, f"inspect.file={file}"]
    assert command("inspect", *proof, f"inspect.run={run}") == 0
    out = capsys.readouterr().out
    assert "every key binds" in out
    assert "alpha: 64" in out
    assert "mode: video=generate;audio=generate;conditions=reference" in out
    whole = load_file(file)

    def refused(tensors: dict[str, torch.Tensor] | None, message: str, *more: str, code: int = 78) -> None:
        if tensors is not None:
            save_file(tensors, file)
        assert command("inspect", *proof, *more) == code
        assert message in capsys.readouterr().err

    refused(None, "trained on another base", "model.weights=random")
    first = next(iter(whole))
    refused({k: v for k, v in whole.items() if k != first}, "its other half is missing")
    refused({**whole, "diffusion_model.nowhere.lora_A.weight": torch.zeros(32, 8)}, "the base has no such module")
    refused({**whole, first: torch.full_like(whole[first], float("nan"))}, "not finite")
    refused({k: v * 1.01 for k, v in whole.items()}, "does not reproduce the trainer's output", f"inspect.run={run}")
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-100])
    refused(None, "not a readable safetensors file")
    file.unlink()
    refused(None, "there is no such file")


def test_export_of_a_given_step(trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    run, overrides = trained
    assert command("export", *overrides, "export.step=3") == 0
    assert (run / "audio_reference-lora-step-000003.safetensors").is_file()
    assert command("export", *overrides, "export.step=4") == 78
    assert "there are: 3, 6" in capsys.readouterr().err


def newest_weights(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1] / "weights.safetensors"


def test_a_full_checkpoint_is_the_original_layout(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """Everything but the transformer is the base's, bit for bit, so that prepared data stay valid."""
    base = tmp_path / "full.safetensors"
    where = [
        "experiment=tiny_base", f"model.path={TINY}", f"data.root={prepared}", "data.heldout_speakers=0.4",
        f"run.root={tmp_path}", "optim.steps=2", "eval.interval=0", "logger=local", "data.reference_s=1.0",
    ]  # fmt: skip
    assert command("fit", *where) == 0
    assert command("export", *where, f"export.out={base}") == 0
    made, original = CheckpointFile.open(base), CheckpointFile.open(TINY)
    assert made.shapes == original.shapes
    assert made.config == original.config
    weights = load_file(newest_weights(tmp_path / "tiny_base" / "main"))
    written = load_file(base)
    assert all(torch.equal(written[transformer_original_name(k)], v) for k, v in weights.items())
    for prefix in ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection."):
        assert made.fingerprint(prefix) == original.fingerprint(prefix)
    assert made.fingerprint("model.diffusion_model.") != original.fingerprint("model.diffusion_model.")


def test_streamed_training_is_resident_training(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """`fit` with every block streamed: the same curve and the same adapter, bit for bit, validation included."""
    rows, weights = [], []
    for name in ("int8", "int8_stream"):
        where = settings(
            prepared, clips, f"run.root={tmp_path / name}", "optim.steps=6", "eval.interval=3", "logger.every=1"
        )
        assert command("fit", *where, f"memory={name}", "memory.stream_slots=2") == 0
        run = tmp_path / name / "audio_reference" / "main"
        rows.append(
            [
                {k: v for k, v in row.items() if not k.startswith(("perf/", "run/"))}
                for row in read_rows(run / "metrics.jsonl")
            ]
        )
        weights.append(load_file(run / "checkpoints" / "step-000006" / "weights.safetensors"))
    assert rows[0] == rows[1]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert "perf/stream_stall_s" in read_rows(tmp_path / "int8_stream/audio_reference/main/metrics.jsonl")[-1]


def test_wandb_offline_is_the_default(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [w for w in settings(prepared, clips, f"run.root={tmp_path}", "optim.steps=2") if w != "logger=local"]
    assert command("fit", *where, "eval.interval=0", "logger.every=1") == 0
    run = tmp_path / "audio_reference" / "main"
    recorded = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(recorded) == 1
    assert f"to upload: wandb sync {recorded[0].parent}" in capsys.readouterr().out
    assert recorded[0].stat().st_size > 500
    assert len(read_rows(run / "metrics.jsonl")) == 2


def test_a_given_reference_and_one_that_is_the_target(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference_audio column is used as it is; a clip given itself as reference is refused."""
    source = tmp_path / "clips"
    shutil.copytree(clips, source)
    rows = json.loads((source / "CAPTIONS.json").read_text())["captions"]
    others = {row["file"]: next(r["file"] for r in rows if r["speaker"] != row["speaker"]) for row in rows}
    for name, given in (("other", others), ("self", {row["file"]: row["file"] for row in rows})):
        table = [{**row, "reference_audio": given[row["file"]]} for row in rows]
        (source / "CAPTIONS.json").write_text(json.dumps({"captions": table}))
        where = settings(tmp_path / name, source, "data.reference_s=1.32", "check.previews=0")
        assert command("prepare", *where) == 0
        capsys.readouterr()
        code = command("check", *where)
        out = capsys.readouterr().out
        assert code == (78 if name == "self" else 0), out
        assert ("its reference is its own target" in out) == (name == "self")


def test_preparing_goes_on_where_it_stopped(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ltx_train.data.prepare.encode import Encoders

    original, done = Encoders.clip, 0

    def stopping(encoders: Encoders, *arguments: object) -> object:
        nonlocal done
        done += 1
        if done == 6:
            raise KeyboardInterrupt
        return original(encoders, *arguments)  # type: ignore[arg-type]

    where = settings(tmp_path / "data", clips)
    monkeypatch.setattr(Encoders, "clip", stopping)
    assert command("prepare", *where) == 75
    assert not (tmp_path / "data" / "index.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.chdir(REPOSITORY)
    assert command("prepare", *where) == 0
    assert "11 clips encoded, 5 unchanged" in capsys.readouterr().out
    assert command("prepare", *where, "data.reference_s=0.8") == 0
    assert "16 clips encoded, 0 unchanged" in capsys.readouterr().out
