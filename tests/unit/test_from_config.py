"""The seam between settings and the rooms below: every setting reaches the field of its name."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest
import torch

from ltx_train import config
from ltx_train.assembly import from_config, memory_plan, model_source, resolve, summary
from ltx_train.assembly.setup import setup
from ltx_train.config import Config
from ltx_train.config.settings import all_settings
from ltx_train.diffusion.sigma import levels
from ltx_train.evaluation.rows import Grid
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


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy=single"], (0, False, False, False, True)),
        (["strategy=ddp"], (0, False, False, False, True)),
        (["strategy=zero1"], (1, False, False, False, True)),
        (["strategy=zero2"], (2, False, True, False, True)),
        (["strategy=zero3"], (0, True, True, False, False)),
        (["strategy=zero1", "adapter=full", "memory=none"], (1, False, False, True, True)),
        (["strategy=zero2", "adapter=full", "memory=none"], (2, False, True, True, True)),
        (["strategy=zero3", "adapter=full", "memory=recompute"], (3, True, True, True, False)),
        (["strategy=ddp", "strategy.sequence=2"], (0, False, False, False, False)),
    ],
)
def test_what_ranks_share_is_decided_once(overrides: list[str], expected: tuple[int, bool, bool, bool, bool]) -> None:
    devices = [] if overrides == ["strategy=single"] else ["strategy.devices=4"]
    shared = resolve.sharing(config.compose_config([*overrides, "optim=adamw", *devices]))
    found = (
        shared.update_stage, shared.gathers_blocks, shared.lockstep, shared.saves_slices, shared.measures_apart,
    )  # fmt: skip
    assert found == expected
    assert shared.readers == shared.world // shared.sequence


def test_random_weights_need_no_file() -> None:
    """Sizes and weights come from the same source."""
    config = made("model", {"weights": "random", "preset": "tiny", "path": "missing.safetensors"})
    names = {name for name, _ in build_transformer(RandomWeights("tiny")).named_parameters()}
    assert {name for name, _ in model_source.skeleton(config).named_parameters()} == names
