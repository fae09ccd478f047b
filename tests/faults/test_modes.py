"""Every mode through the commands: prepared shards in, two training steps, a measurement, an adapter out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ltx_train.contracts import Exit
from ltx_train.data import index
from ltx_train.data.reader import VIDEO, Reader
from ltx_train.data.record import Record
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command, settings
from tests.packing import repacked

PRESETS = sorted(p.stem for p in (REPOSITORY / "conf/mode").glob("*.yaml"))
Tensors = dict[str, torch.Tensor]


def changed(prepared: Path, root: Path, change: Callable[[Record, Tensors], None]) -> Path:
    """A copy of prepared data whose tensors `change` has altered."""
    shutil.copytree(prepared, root)
    reader = Reader(prepared, index.load(prepared), seed=0)

    def tensors(record: Record) -> Tensors:
        found = reader.tensors(reader.records[record.key])
        change(record, found)
        return found

    repacked(root, tensors)
    return root


@pytest.fixture(scope="module")
def rich(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared clips with controls, subjects and masks beside their latents."""

    def add(record: Record, tensors: Tensors) -> None:
        video = tensors[VIDEO]
        tensors["reference_video_latent"] = video.flip(-1) * 0.9
        tensors["subject_video_latent"] = video[:, :1, :1, :1].clone()
        tensors["video_mask"] = torch.zeros(video.shape[1:])
        tensors["video_mask"][:2] = 1
        tensors["audio_mask"] = (torch.arange(33) % 4 == 0).float()

    return changed(prepared, tmp_path_factory.mktemp("rich") / "data", add)


def overrides(root: Path, runs: Path, clips: Path, *more: str) -> list[str]:
    return [
        *settings(root, clips), f"run.root={runs}", "optim.steps=2", "optim.batch_size=2", "optim.name=adamw",
        "memory=none", "eval.interval=2", "eval.quantiles=2", "eval.sigmas=[]", "eval.max_samples=2",
        "logger.every=1", "checkpoint.interval=2", *more,
    ]  # fmt: skip


def rows(folder: Path) -> list[dict[str, float]]:
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_is_measured(name: str, rich: Path, clips: Path, tmp_path: Path) -> None:
    asked = [f"mode={name}", "adapter=auto", f"run.experiment={name}"]
    assert command("fit", *overrides(rich, tmp_path, clips, *asked)) == Exit.DONE
    folder = tmp_path / name / "main"
    last = rows(folder)[-1]
    assert last["val/loss"] > 0
    assert {f"train/sigma_share/{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)} <= set(last)
    assert last["train/grad_norm"] > 0
    with safe_open(folder / "adapters/step-000002.safetensors", "pt") as file:
        names = list(file.keys())
        told = "reference_downscale_factor" in file.metadata()
        moved = [n for n in names if ".lora_B." in n and bool(file.get_tensor(n).any())]
    assert told == (name in ("v2v_ic", "multi_reference_ic", "av2av_ic"))
    # Every layer that was given an adapter has learned: none of them is out of the loss's reach.
    assert len(moved) == len(names) // 2
    assert ("val/reference_gap_dropped" in last) == (name.endswith(("_ic", "reference")) or name == "id_lora")
    assert ("val/reference_attention" in last) == ("val/reference_gap_dropped" in last)


@pytest.mark.slow
def test_a_mixture_trains_all_its_modes(rich: Path, clips: Path, tmp_path: Path) -> None:
    asked = ["mode=t2av", "adapter=auto", "mixture={t2av: 1, a2v: 1, t2a: 1}", "run.experiment=mixed", "optim.steps=6"]
    assert command("fit", *overrides(rich, tmp_path, clips, *asked)) == Exit.DONE
    found = rows(tmp_path / "mixed/main")
    seen = [("train/loss_video" in row, "train/loss_audio" in row) for row in found if "train/loss" in row]
    assert len(set(seen)) > 1
    saved = (tmp_path / "mixed/main/config.yaml").read_text()
    assert "modes:" in saved
    # The same command finds the run complete: the saved mixture compares equal to the one asked for.
    assert command("fit", *overrides(rich, tmp_path, clips, *asked)) == Exit.DONE


@pytest.mark.slow
def test_a_full_fine_tune_of_any_mode(rich: Path, clips: Path, tmp_path: Path) -> None:
    asked = ["mode=v2v_ic", "adapter=full", "run.experiment=full"]
    assert command("fit", *overrides(rich, tmp_path, clips, *asked)) == Exit.DONE
    assert (tmp_path / "full/main/checkpoints/step-000002/weights.safetensors").is_file()


OPTIONS = {
    "prodigy": ("optim=prodigy",),
    "paged": ("optim=paged_adamw8bit",),
    "cosmap": ("loss.weighting=cosmap", "sigma.kind=uniform"),
    "weighed tokens": ("loss.token_weights={video_mask: 3, audio_mask: 0}",),
    "own levels": ("mode.sigma=independent", "sigma.kind=logit_normal"),
    "dora": ("adapter.dora=true", "adapter.rank_pattern={to_q: 4}", "adapter.alpha_pattern={to_k: 8}"),
    "rslora": ("adapter.rslora=true", "adapter.init=orthogonal", "adapter.dropout=0.1"),
    "samples": ("eval.samples=1", "sample.steps=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_export_and_pass_inspect(name: str, rich: Path, clips: Path, tmp_path: Path) -> None:
    """`fit`, then `export`, whose file gives the trainer's own output when it is merged (`inspect`)."""
    asked = overrides(rich, tmp_path, clips, "mode=t2av", "adapter=auto", "run.experiment=o", *OPTIONS[name])
    assert command("fit", *asked) == Exit.DONE
    folder = tmp_path / "o/main"
    assert rows(folder)[-1]["train/grad_norm"] > 0
    file = tmp_path / "lora.safetensors"
    assert command("export", *asked, f"export.out={file}") == Exit.DONE
    assert command("inspect", *asked, f"inspect.file={file}", f"inspect.run={folder}") == Exit.DONE
    made = {path.parent.name for path in (folder / "samples").rglob("*.mp4")}
    assert made == ({"real", "base", "step-000002"} if name == "samples" else set())


@pytest.mark.slow
def test_training_goes_on_from_one_lora_on_top_of_another(rich: Path, clips: Path, tmp_path: Path) -> None:
    """A LoRA merged into the base, the same file to start from: exported, inspected and measured on that base alone."""
    common = ("mode=t2av", "adapter=attention", "optim.lr=0.05")
    first = overrides(rich, tmp_path, clips, *common, "run.experiment=first")
    assert command("fit", *first) == Exit.DONE
    file = tmp_path / "first/main/adapters/step-000002.safetensors"
    onto = overrides(
        rich, tmp_path, clips, *common, "run.experiment=second", f"model.merge={file}", "model.merge_strength=0.5",
        f"adapter.start_from={file}", "adapter.alpha=16", "optim.lr=0", "optim.final_lr=0",
    )  # fmt: skip
    assert command("fit", *onto) == Exit.DONE
    second = tmp_path / "second/main"
    start, end = (load_file(path) for path in (file, second / "adapters/step-000002.safetensors"))
    assert all(torch.allclose(start[name].float(), end[name].float(), atol=1e-6) for name in start)
    assert command("evaluate", *onto) == Exit.DONE
    exported = tmp_path / "second.safetensors"
    assert command("export", *onto, f"export.out={exported}") == Exit.DONE
    assert command("inspect", *onto, f"inspect.file={exported}", f"inspect.run={second}") == Exit.DONE
    # On the plain base the file is refused: it was trained on another one.
    assert command("inspect", *first, f"inspect.file={exported}") == Exit.DATA


@pytest.mark.slow
def test_layers_that_never_move_are_reported(
    rich: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["mode=t2av", "adapter=auto", "optim.lr=0", "optim.final_lr=0", "optim.steps=21", "eval.interval=0"]
    assert command("fit", *overrides(rich, tmp_path, clips, *asked)) == Exit.DONE
    assert "adapter layers have not moved since the start" in capsys.readouterr().err
    assert rows(tmp_path / "audio_reference/main")[-1]["train/dead_adapters"] == 24


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda _r, t: t.pop("video_mask"), ["mode=inpaint"], "no video_mask in the shards"),
        (lambda _r, t: t["video_mask"].fill_(1), ["mode=inpaint"], "video_mask gives every place"),
        (lambda _r, t: t["video_mask"].fill_(3), ["mode=inpaint"], "outside [0, 1]"),
        (lambda _r, t: t.update(video_mask=torch.zeros(1, 2, 2)), ["mode=inpaint"], "not the grid of the video"),
        (lambda _r, t: t.update(reference_video_latent=t[VIDEO].clone()), ["mode=v2v_ic"], "is its own target"),
        (lambda _r, t: t.pop("reference_video_latent"), ["mode=v2v_ic"], "no reference_video_latent in the shards"),
        (lambda _r, t: t.update(reference_video_latent=torch.randn(16, 5, 2, 3)), ["mode=v2v_ic"], "a whole number of"),
        (lambda _r, t: t.pop("audio_latent"), ["mode=t2a"], "no audio, but the mode needs it"),
        (lambda _r, t: t.pop("video_mask"), ["mode=t2v", "loss.token_weights={video_mask: 2}"], "no video_mask in the"),
    ],
)  # fmt: skip
def test_data_that_do_not_serve_the_mode_are_refused(
    change: object, more: list[str], message: str, rich: Path, clips: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = changed(rich, tmp_path / "data", change)
    assert command("fit", *overrides(root, tmp_path / "runs", clips, "adapter=auto", *more)) == Exit.DATA
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs/audio_reference/main/checkpoints").exists()
