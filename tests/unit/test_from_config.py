"""The seam between settings and the rooms below: every setting reaches the field of its name."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_train import config
from ltx_train.assembly import from_config, memory_plan, model_source, resolve, summary
from ltx_train.assembly.setup import setup
from ltx_train.config import Config
from ltx_train.config.settings import all_settings
from ltx_train.data import index
from ltx_train.diffusion.sigma import levels
from ltx_train.distributed.ranks import Ranks
from ltx_train.evaluation.rows import Grid
from ltx_train.model import adapter
from ltx_train.model.adapter import Lora
from ltx_train.model.checkpoint import RandomWeights
from ltx_train.model.loaders import build_transformer
from ltx_train.updates.kinds import OPTIMIZERS

# A value of its own for every setting of a group, so that two that are swapped are seen.
SIGMA = {
    "std": 0.71, "eps": 0.012, "uniform_prob": 0.13, "mean": 0.14, "tokens": 15, "low": 0.16, "high": 0.97,
    "high_from": 0.18, "high_prob": 0.19,
}  # fmt: skip
LORA: dict[str, Any] = {"rank": 5, "alpha": 6.0, "dropout": 0.07, "rslora": True, "dora": False, "init": "gaussian"}
OPTIM = {"lr": 0.1, "final_lr": 0.02, "warmup": 3, "steps": 40, "schedule": "cosine"}
EVAL: dict[str, Any] = {
    "seed": 11, "batch_size": 12, "max_samples": 13, "wrong_references": 14, "dropped": False, "wrong_caption": True,
}  # fmt: skip


def made(group: str, values: dict[str, Any], *more: str) -> Config:
    return config.compose_config([f"{group}.{name}={value}" for name, value in values.items()] + list(more))


def test_noise_levels_get_the_settings_of_their_names() -> None:
    drawn = asdict(from_config.sigma_distribution(made("sigma", SIGMA, "sigma.shift_limits=[0.5,1.5]")))
    assert {name: drawn[name] for name in SIGMA} == SIGMA
    assert drawn["shift_limits"] == (0.5, 1.5)
    assert {f.name for f in fields(from_config.sigma_distribution(config.compose_config([])))} == {
        name.partition(".")[2] for name in all_settings() if name.startswith("sigma.")
    }


def test_the_default_noise_levels_are_spread() -> None:
    """By hand, of 4096 tokens (mu = 2.05): s(x) = sigmoid(2.05 + x), stretched from [s(-2.5758), s(3.0902)] to [0, 1].
    With std and eps exchanged, every level would be 1."""
    distribution = from_config.sigma_distribution(config.compose_config([]))
    drawn = levels(torch.tensor([-1.6449, 0.0, 1.6449]), torch.zeros(3), torch.ones(3), 4096, distribution)
    assert drawn.tolist() == pytest.approx([0.3668, 0.8262, 0.9703], abs=1e-3)


def test_a_schedule_and_an_optimizer_get_the_settings_of_their_names() -> None:
    run = made("optim", OPTIM, "optim.betas=[0.8,0.95]", "optim.weight_decay=0.03")
    schedule = asdict(from_config.schedule(run))
    assert schedule == {"kind": "cosine", "lr": 0.1, "final_lr": 0.02, "warmup": 3, "steps": 40}
    assert asdict(from_config.optimizer_settings(run)) == {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.03}


def test_an_adapter_gets_the_settings_of_their_names() -> None:
    lora = from_config.lora(made("adapter", LORA))
    assert isinstance(lora, Lora)
    assert {name: getattr(lora, name) for name in LORA} == LORA


def test_measuring_gets_the_settings_of_their_names() -> None:
    run = made("eval", EVAL, "loss.video_weight=0.25", "loss.audio_weight=0.75")
    settings = from_config.measurement_settings(run, Grid((0.5,), ()))
    assert {name: getattr(settings, name) for name in EVAL} == EVAL
    assert (settings.video_weight, settings.audio_weight, settings.levels) == (0.25, 0.75, (0.5,))


def test_a_recipe_gets_the_settings_of_their_names() -> None:
    run = config.compose_config(["data.fps=24", "data.reference_s=2.5", "data.samples_per_shard=7", "run.seed=9"])
    recipe = from_config.recipe(run)
    assert (recipe.fps, recipe.reference_s, recipe.samples_per_shard, recipe.seed) == (24, 2.5, 7, 9)
    assert [str(bucket) for bucket in recipe.buckets] == run.data.buckets


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_panel_plan_and_checkpoints_count_the_bytes_of_one_table(name: str) -> None:
    """By hand, bytes per parameter: a master, its gradient, and two moments in float32, in 8 bit, or prodigy's four."""
    moments = {"adamw": 8, "adamw8bit": 2.03125, "paged_adamw8bit": 2.03125, "prodigy": 16}[name]
    run = setup(config.compose_config([f"optim.name={name}"]))
    model = build_transformer(RandomWeights("tiny"))
    count = 3 * 2**30 // 8
    assert summary.memory(run, model.requires_grad_(True), count) == (
        f"{count * (4 + 4 + moments) / 2**30:.2f} GiB masters, gradients and moments"
    )
    assert memory_plan.trained_weights(run.config, model).moment_bytes == moments
    assert resolve.optimizer(run.config).saved_bytes == 4 + moments


def test_the_panel_has_at_most_twenty_lines(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 80 columns, where the console is none; of the recipe with the most to tell."""
    made = config.compose_config([
        "experiment=voice_reference_22b", "model=tiny", f"data.root={prepared}", "data.buckets=[64x64x33,64x32x33]",
        "strategy=zero1", "optim=adamw", "optim.global_batch=4",
    ])  # fmt: skip
    model = build_transformer(RandomWeights("tiny"))
    lora = from_config.lora(made)
    adapter.attach(model, lora, 0)
    trained = {name: p.numel() for name, p in adapter.trainable_parameters(model).items()}
    folder = Path("runs/voice_reference_22b/main")
    summary.show(setup(made), model, trained, index.load(prepared), folder=folder, step=0)
    shown = capsys.readouterr().out.splitlines()
    assert 12 < len(shown) <= 20, "\n".join(shown)
    assert max(map(len, shown)) <= 80
    assert any(line.startswith("│ frozen     attn1, attn2, ff ") for line in shown)


SLICED_FULL = ("adapter=full", "memory=recompute")


@pytest.mark.parametrize(
    ("overrides", "machines", "expected"),
    [
        ((), 1, ("own", 0, False, False, False, False)),
        (("strategy=ddp",), 2, ("own", 0, False, False, False, False)),
        (("strategy=zero1",), 1, ("own", 1, False, False, False, False)),
        (("strategy=zero2",), 1, ("own", 2, False, True, False, False)),
        (("strategy=zero3",), 1, ("own", 0, True, True, False, True)),
        (("strategy=zero1", *SLICED_FULL), 1, ("own", 1, False, False, True, False)),
        (("strategy=zero2", *SLICED_FULL), 1, ("own", 2, False, True, True, False)),
        (("strategy=zero3", *SLICED_FULL), 1, ("own", 3, True, True, True, True)),
        (("strategy=ddp", "strategy.sequence=2"), 1, ("own", 0, False, False, False, True)),
        (("strategy=zero1",), 2, ("deepspeed", 1, False, True, False, False)),
        (("strategy=zero2", *SLICED_FULL), 2, ("deepspeed", 2, False, True, True, False)),
        (("strategy=zero3",), 2, ("deepspeed", 2, True, True, False, True)),
        (("strategy=deepspeed_zero3",), 1, ("deepspeed", 2, True, True, False, True)),
        (("strategy=zero3", *SLICED_FULL), 2, ("deepspeed", 3, False, True, True, True)),
        (("strategy=deepspeed_zero3", *SLICED_FULL), 1, ("deepspeed", 3, False, True, True, True)),
    ],
)
def test_what_ranks_share_is_decided_once(
    overrides: tuple[str, ...], machines: int, expected: tuple[str, int, bool, bool, bool, bool]
) -> None:
    """The own ZeRO on one machine, DeepSpeed's on several, or on one by its name."""
    devices = ["strategy.devices=4"] if overrides else []
    made = config.compose_config([*overrides, "optim=adamw", *devices])
    shared = resolve.sharing(made, on_machines=machines)
    found = (
        shared.engine, shared.update_stage, shared.gathers_blocks, shared.lockstep, shared.saves_slices,
        shared.measures_together,
    )  # fmt: skip
    assert found == expected
    assert shared.readers == shared.world // shared.sequence
    assert shared.world == (4 if overrides else 1) * machines
    # The own stream slices within a machine, DeepSpeed over all of them.
    sliced = "strategy=zero3" in overrides or "strategy=deepspeed_zero3" in overrides
    assert shared.block_slices == (1 if not sliced else 4 if shared.gathers_blocks else shared.world)
    assert shared.hpz == (4 if machines > 1 and overrides else 1)


def test_the_own_engine_is_refused_on_several_machines() -> None:
    made = config.compose_config(["strategy=zero3", "strategy.engine=own", "optim=adamw", "strategy.devices=2"])
    assert resolve.sharing(made, Ranks(0, 2)).engine == "own"
    with pytest.raises(config.ConfigError, match="copies slices between the devices of one"):
        resolve.sharing(made, Ranks(0, 4))
    with pytest.raises(config.ConfigError, match="set optim=adamw"):
        resolve.for_job(config.compose_config(["strategy=zero3", "optim=adamw8bit"]), 2, 2)


def test_random_weights_need_no_file() -> None:
    """Sizes and weights come from the same source."""
    config = made("model", {"weights": "random", "preset": "tiny", "path": "missing.safetensors"})
    names = {name for name, _ in build_transformer(RandomWeights("tiny")).named_parameters()}
    assert {name for name, _ in model_source.skeleton(config).named_parameters()} == names
