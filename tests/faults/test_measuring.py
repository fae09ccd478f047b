"""Runs that measure themselves: what is recorded, kept, compared and shown, and that measuring changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ltx_train import config
from ltx_train.assembly.live_view import LiveView
from ltx_train.contracts import Exit
from ltx_train.evaluation import history
from ltx_train.training.tracking.metrics import read_rows
from tests.browser import look
from tests.conftest import command, settings

pytestmark = pytest.mark.slow


def overrides(root: Path, clips: Path, runs: Path, *more: str) -> list[str]:
    return [
        *settings(root, clips), f"run.root={runs}", "optim.steps=12", "optim.batch_size=2", "optim.name=adamw",
        "optim.lr=0.01", "optim.warmup=0", "memory=none", "eval.interval=4", "eval.quantiles=3", "eval.sigmas=[0.5]",
        "logger.every=2", "checkpoint.interval=4", *more,
    ]  # fmt: skip


def rows(run: Path) -> list[dict[str, float]]:
    return read_rows(run / "metrics.jsonl")


def weights(run: Path, step: int = 12) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/weights.safetensors")


@pytest.fixture(scope="module")
def trained(prepared: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that keeps a moving average and balances its losses."""
    runs = tmp_path_factory.mktemp("runs")
    more = ("adapter.ema=0.9", "loss.balance=auto", "logger.also=[csv,tensorboard]", "checkpoint.keep=1")
    assert command("fit", *overrides(prepared, clips, runs, *more)) == Exit.DONE
    return runs / "audio_reference/main"


def test_measuring_leaves_training_as_it_is(prepared: Path, clips: Path, tmp_path: Path) -> None:
    """Weights and moments are bit for bit those of a run that is never measured."""
    for name, interval in (("measured", 3), ("not", 0)):
        more = (f"run.experiment={name}", f"eval.interval={interval}", "adapter.dropout=0.1")
        assert command("fit", *overrides(prepared, clips, tmp_path, *more)) == Exit.DONE
    first, second = (tmp_path / name / "main/checkpoints/step-000012" for name in ("measured", "not"))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_rows_have_every_comparison_with_its_interval(trained: Path) -> None:
    last = rows(trained)[-1]
    for name in ("loss", "loss_video", "loss_audio", "reference_gap", "reference_gap_dropped", "adapter_gain"):
        assert f"val/{name}" in last
        assert last[f"val/{name}_ci95"] >= 0
    assert "val/caption_gap" not in last  # one caption for all
    assert last["val/reference_attention"] > 0
    assert {n for n in last if n.startswith("train/grad_norm/")} == {
        f"train/grad_norm/{p}"
        for p in ("audio_attn1", "audio_attn2", "audio_ff", "audio_to_video_attn", "video_to_audio_attn")
    }
    assert {n.replace("grad_norm", "adapter_norm_ratio") for n in last if n.startswith("train/grad_norm/")} <= set(last)
    assert last["train/weight_video"] != last["train/weight_audio"]
    assert [m.step for m in history.read(trained)] == [4, 8, 12]
    assert (trained / "metrics.csv").is_file()


def test_the_page_is_written_while_a_run_trains(trained: Path) -> None:
    """By `fit` alone: nothing has evaluated the run."""
    page = (trained / "report.html").read_text()
    for wanted in ("Verdicts", "Checkpoints", "learning rate", "12 of 12 steps in"):
        assert wanted in page
    assert page.count("data:image/svg") >= 2
    parts = LiveView(config.load(trained / "config.yaml"), trained).parts()
    assert "step 12 of 12, complete" in parts["progress"]
    assert "Checkpoints" in parts["results"]


def test_a_folder_to_publish_has_a_card_and_no_path_of_this_machine(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = tmp_path / "hub"
    asked = (f"export.out={tmp_path / 'voice.safetensors'}", f"export.hub_folder={hub}")
    assert command("export", str(trained), *asked) == Exit.DONE
    assert {p.name for p in hub.iterdir()} == {"README.md", "config.yaml", "voice.safetensors"}
    card = (hub / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other"
    assert front["base_model"] == "tiny"
    for wanted in ("Gained gap:", "Lightricks", "learning rate", "people who are not trained on", "± "):
        assert wanted in card
    for text in (card, (hub / "config.yaml").read_text()):
        assert "/tmp" not in text
        assert str(trained.parent) not in text
    assert config.load(hub / "config.yaml").optim == config.load(trained / "config.yaml").optim
    assert command("export", str(trained), *asked) == Exit.DONE, "once more into the same folder"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert command("export", str(trained), asked[0], f"export.hub_folder={other}") == Exit.CONFIG
    assert "is no such folder" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["mine.txt"]


def test_the_best_is_kept_and_linked(trained: Path) -> None:
    measured = {int(row["step"]): row["val/loss"] for row in rows(trained) if "val/loss" in row}
    best = min(measured, key=lambda step: measured[step])
    assert (trained / "adapters/best.safetensors").resolve().name == f"step-{best:06d}.safetensors"
    kept = sorted(int(p.name.removeprefix("step-")) for p in (trained / "checkpoints").glob("step-*"))
    assert kept == sorted({best, 12})


def test_the_average_is_what_is_published(trained: Path) -> None:
    average = load_file(trained / "checkpoints/step-000012/average.safetensors")
    published = load_file(trained / "adapters/step-000012.safetensors")
    for name, tensor in average.items():
        # Alpha equals rank, so nothing is scaled.
        assert torch.equal(published[f"diffusion_model.{name}"].float(), tensor.float())
    assert any(not torch.equal(average[n], t) for n, t in weights(trained).items())


@pytest.mark.parametrize("step", [8, 12])
def test_inspect_compares_with_the_average_of_the_same_step(
    step: int, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of a step whose checkpoint was removed is compared with the base alone."""
    there = (trained / f"checkpoints/step-{step:06d}").is_dir()
    capsys.readouterr()
    assert command("inspect", str(trained), f"inspect.file={trained}/adapters/step-{step:06d}.safetensors") == Exit.DONE
    assert ("against the trainer's output" if there else f"no longer has the checkpoint of step {step}") in (
        capsys.readouterr().out
    )


def test_averages_and_balances_continue_bit_for_bit(prepared: Path, clips: Path, tmp_path: Path) -> None:
    more = ("adapter.ema=0.9", "loss.balance=auto", "logger.also=[csv,tensorboard]")
    # The schedule runs to the last step, so a run that was always meant to have twelve is cut, not shortened.
    asked = overrides(prepared, clips, tmp_path, *more, "checkpoint.keep=9", "run.id=whole")
    assert command("fit", *asked) == Exit.DONE
    whole, cut = tmp_path / "audio_reference/whole", tmp_path / "audio_reference/cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-000012")
    assert command("fit", *asked[:-1], "run.id=cut") == Exit.DONE
    for file in ("weights.safetensors", "optimizer.safetensors", "average.safetensors"):
        first, second = (run / "checkpoints/step-000012" / file for run in (whole, cut))
        assert first.read_bytes() == second.read_bytes()
    assert [r["train/loss"] for r in rows(whole) if "train/loss" in r] == [
        r["train/loss"] for r in rows(cut) if "train/loss" in r
    ]


def test_a_run_that_no_longer_improves_ends_by_itself(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of zero: two measurements without a better loss, then the end, for good."""
    asked = overrides(
        prepared,
        clips,
        tmp_path,
        "optim.lr=0",
        "optim.final_lr=0",
        "optim.steps=40",
        "eval.interval=2",
        "eval.patience=2",
    )
    assert command("fit", *asked) == Exit.DONE
    output = capsys.readouterr().out
    assert "ended at step" in output
    assert "checkpoints by held-out loss" in output
    run = tmp_path / "audio_reference/main"
    last = int(rows(run)[-1]["step"])
    assert last == 6
    assert command("fit", *asked) == Exit.DONE
    assert "is complete" in capsys.readouterr().out
    assert int(rows(run)[-1]["step"]) == last


@pytest.fixture(scope="module")
def compared(trained: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that compares the run's adapters, with samples."""
    del prepared
    asked = [f"checkpoints={trained}", "eval.samples=1", "sample.steps=2", "eval.quantiles=2", "eval.sigmas=[0.5]"]
    assert command("evaluate", *asked) == Exit.DONE
    return trained / "comparison.html"


def test_adapters_are_compared_with_the_numbers_of_fit(compared: Path, trained: Path) -> None:
    page = compared.read_text()
    for step in (4, 8, 12):
        assert f"audio_reference/main step {step}" in page
    assert "the best" in page
    assert ">base<" in page
    assert page.count("data:video/mp4;base64,") == 3 + 1 + 2  # three adapters, the base, the reference, the real clip
    assert "http://" not in page
    assert "https://" not in page
    assert "nan" not in re.sub(r"data:[^\"]*", "", page.partition("<h2>Curves")[0])


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (800, False), (1200, True), (1200, False)])
def test_a_browser_shows_the_page(width: int, dark: bool, compared: Path, tmp_path: Path) -> None:
    """As wide as its window, with figures that have sizes and films of the right length; nothing is fetched."""
    asked = (
        "{pictures:q('figure>img:not(.still)').map(i=>i.naturalWidth),films:q('video').map(v=>v.duration),"
        "posters:q('video').map(v=>v.poster.slice(0,15)),width:document.documentElement.scrollWidth,"
        "ink:getComputedStyle(document.body).color,"
        "fetched:performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:')).length}"
    )
    layout = look(compared, tmp_path, asked, width=width, dark=dark)
    assert len(layout["pictures"]) >= 6
    assert min(layout["pictures"]) > 300
    assert layout["fetched"] == 0
    assert layout["width"] <= width
    assert len(layout["films"]) == 6
    assert all(0.9 < length < 1.6 for length in layout["films"])
    assert layout["posters"].count("data:image/jpeg") == 5, "a reference is a sound"
    assert layout["ink"] == ("rgb(230, 230, 230)" if dark else "rgb(34, 34, 34)")


def test_evaluate_without_adapters_or_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", f"checkpoints={tmp_path}") == Exit.CONFIG
    assert "no LoRA there" in capsys.readouterr().err
    assert command("evaluate", "checkpoints=[]") == Exit.CONFIG
    assert "checkpoints=[]: give" in capsys.readouterr().err
    assert command("evaluate", "experiment=audio_reference", "data.root=''") == Exit.CONFIG
    assert "data.root is not set" in capsys.readouterr().err


@pytest.mark.slow
def test_the_swap_test_finds_nothing_in_an_adapter_that_was_never_trained(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its clips are those of the base, whatever the reference; and nothing is missing on the page."""
    words = settings(prepared, clips, f"run.root={tmp_path}", "optim.lr=0", "optim.steps=1", "eval.interval=0")
    assert command("fit", *words) == Exit.DONE
    folder = tmp_path / "audio_reference/main"
    capsys.readouterr()
    asked = ("swap.strengths=[0,0.5]", "sample.steps=2", "sample.video_cfg=2", "sample.audio_cfg=2")
    assert command("evaluate", "swap", str(folder), *asked) == Exit.DONE
    shown = capsys.readouterr().out
    on, off = (line.partition(": ")[2] for line in shown.splitlines() if line.startswith(("adapter on", "adapter off")))
    assert on == off
    assert "With the adapter the output follows" not in shown
    page = (folder / "swap.html").read_text()
    assert page.count("<video") == 3 * 3 + 2, "a reference and two outputs for each speaker, silence and no reference"
    assert "voiced share" in page
    assert {p.name for p in (folder / "samples/swap").glob("none*.mp4")} == {
        "none-of-them-silence.mp4", "none-of-them-no-reference.mp4",
    }  # fmt: skip
