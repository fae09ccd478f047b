"""The shipped configurations: all compose, and the recipes are the published ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from ltx_train import config
from ltx_train.config.schema import Config
from ltx_train.contracts import Condition, ConditionKind, ModalityName
from tests.conftest import REPOSITORY

CONF = REPOSITORY / "conf"
PLACES = ["data.source=x", "data.root=y"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
AUDIO = [f"{a}.{t}" for a in ("audio_attn1", "audio_attn2") for t in ATTENTION]
AUDIO += ["audio_ff.net.0.proj", "audio_ff.net.2"]
BRIDGES = [f"{a}.{t}" for a in ("audio_to_video_attn", "video_to_audio_attn") for t in ATTENTION]

COMMON = {
    "model.preset": "ltx2_3_22b", "model.weights": "file", "model.dtype": "bfloat16", "model.text_tokens": 1024,
    "adapter.kind": "lora", "adapter.rank": 32, "adapter.alpha": 32.0, "optim.batch_size": 1,
    "optim.global_batch": None,
    "optim.betas": [0.9, 0.999], "optim.clip": 1.0, "mode.sigma": "shared",
    "sigma.kind": "shifted_logit_normal", "sigma.std": 1.0, "sigma.eps": 1e-3, "sigma.uniform_prob": 0.1,
    "sigma.tokens": None, "sigma.shift_limits": [], "loss.video_weight": 1.0, "loss.audio_weight": 1.0,
    "loss.balance": "none", "loss.weighting": "none", "loss.token_weights": {}, "mixture": {},
    "sample.steps": 30, "data.fps": 25.0,
}  # fmt: skip
R1 = {
    "mode.video": "generate", "mode.audio": "generate", "adapter.targets": ATTENTION, "adapter.dropout": 0.0,
    "mode.conditions": [asdict(Condition(kind=ConditionKind.first_frame, p=0.5))],
    "optim.name": "adamw", "optim.lr": 1e-4, "optim.final_lr": 1e-5, "optim.schedule": "linear", "optim.warmup": 0,
    "optim.steps": 2000, "memory.quantize": "none", "data.buckets": ["1280x704x153"], "data.trigger": "OHWXPERSON",
    "eval.interval": 250, "sample.video_cfg": 4.0, "sample.audio_cfg": 4.0, "sample.strength": 1.0,
    "sample.bucket": "1280x736x153", "sample.fps": 24.0,
}  # fmt: skip
R2 = {
    "mode.video": "generate", "mode.audio": "generate", "adapter.dropout": 0.05,
    "mode.conditions": [asdict(Condition(kind=ConditionKind.reference, modality=ModalityName.audio))],
    "optim.name": "adamw8bit", "optim.lr": 2e-4, "optim.final_lr": 2e-5, "optim.schedule": "cosine",
    "optim.warmup": 50, "optim.steps": 1000, "memory.quantize": "int8", "data.buckets": ["512x512x121"],
    "data.reference_s": 3.5, "data.caption": "a person is speaking", "data.heldout_speakers": 0.1,
    "sample.video_cfg": 1.0, "sample.audio_cfg": 1.0, "sample.strength": 0.5,
}  # fmt: skip
R3 = {
    "mode.video": "generate", "mode.audio": "freeze", "mode.conditions": [], "adapter.targets": ATTENTION,
    "optim.name": "adamw", "optim.lr": 1e-4, "optim.steps": 2000, "memory.quantize": "none",
    "sample.video_cfg": 3.0, "sample.audio_cfg": 7.0, "sample.modality_scale": 3.0, "sample.stg_scale": 1.0,
    "sample.stg_blocks": [28], "sample.rescale": 0.7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "overrides", "published"),
    [
        ("talking_head_22b", [], R1),
        ("voice_reference_22b", [], {**R2, "adapter.targets": AUDIO + BRIDGES}),
        ("voice_reference_22b", ["adapter=audio_only"], {**R2, "adapter.targets": AUDIO}),
        ("audio_to_video_22b", [], R3),
    ],
)
def test_published_numbers(experiment: str, overrides: list[str], published: dict[str, Any]) -> None:
    made = asdict(config.compose_config([f"experiment={experiment}", *overrides, *PLACES]))
    for name, wanted in {**COMMON, **published}.items():
        value: Any = made
        for part in name.split("."):
            value = value[part]
        assert value == wanted, name


TWINS = {
    "av_lora": "talking_head_22b",
    "audio_reference": "voice_reference_22b",
    "audio_to_video": "audio_to_video_22b",
}
SIZES = {
    "model", "data", "run.experiment", "optim.steps", "optim.batch_size", "eval.interval", "eval.batch_size",
    "checkpoint.interval", "eval.prompts", "sample.bucket", "sample.fps", "sample.steps", "sample.stg_blocks",
}  # fmt: skip


@pytest.mark.parametrize(("tiny", "real"), TWINS.items())
def test_tiny_twins_differ_in_model_data_sizes_and_steps_only(tiny: str, real: str) -> None:
    first, second = (config.flat(config.compose_config([f"experiment={name}", *PLACES])) for name in (tiny, real))
    differing = {k for k in first.keys() | second.keys() if first.get(k) != second.get(k)}
    assert {k for k in differing if k not in SIZES and k.split(".")[0] not in SIZES} == set()


def _options() -> list[str]:
    return [f"{p.parent.name}={p.stem}" for p in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize("option", _options())
def test_every_file_composes_and_is_valid(option: str) -> None:
    # The one that moves what only a full fine-tune has.
    more = ["adapter=full", "memory=recompute", "optim=adamw"] if option == "strategy=zero3_offload" else []
    assert isinstance(config.compose_config([option, *more, *PLACES]), Config)


def test_the_root_is_a_defaults_list_only() -> None:
    text = [line for line in (CONF / "config.yaml").read_text().splitlines() if line and not line.startswith("#")]
    assert text[0] == "defaults:"
    assert all(line.startswith("  - ") for line in text[1:])


def test_every_group_is_in_the_root() -> None:
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    assert groups == {line.split("- ")[1].split(":")[0] for line in (CONF / "config.yaml").read_text().splitlines()
                      if line.startswith("  - ") and ":" in line}  # fmt: skip
