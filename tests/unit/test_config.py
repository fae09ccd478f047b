from __future__ import annotations

from pathlib import Path

import pytest

from ltx_train import config
from ltx_train.contracts import ConfigError


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("optm.lr=1", "did you mean 'optim.lr'"),
        ("adapter=cross_modl", "did you mean 'cross_modal'"),
        ("adapter.kind=loro", "did you mean 'lora'"),
        ("model.preset=tny", "did you mean 'tiny'"),
        ("optim.lr=fast", "optim.lr"),
        ("lr", "key=value"),
        ("data.buckets=[64x64x32]", "nearest: 33"),
        ("data.buckets=[60x64x33]", "multiples of 32"),
        ("data.buckets=[square]", "WIDTHxHEIGHTxFRAMES"),
        ("optim.steps=0", "optim.steps=0: must be at least 1"),
        ("mode.video=maybe", "mode.video"),
        ("eval.sigmas=[0.0]", "eval.sigmas"),
        ("data.heldout_speakers=1", "data.heldout_speakers=1: must lie in [0, 1)"),
    ],
)
def test_mistakes_are_named_with_the_mend(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.compose_config([override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["mode.video=freeze", "mode.audio=freeze"], "nothing is generated"),
        (["mode=a2v", "loss.video_weight=0"], "weight of every generated modality"),
        (["mode=av_i2v", "mode.video=freeze"], "first_frame needs mode.video=generate"),
        (["mode=audio_reference", "mode.audio=freeze"], "reference needs mode.audio=generate"),
        (["adapter=full", "memory=int8"], "memory.quantize=none"),
        (
            ["adapter=audio_only", "mode.audio=absent"],
            "audio_only names layers that mode.audio=absent gives no loss",
        ),
        (["mode.conditions=[{kind: first_frame}, {kind: first_frame}]"], "each kind may stand once"),
        (["mode=av_i2v", "mode.conditions.0.p=2"], "must lie in [0, 1]"),
    ],
)
def test_rules_between_fields(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        config.compose_config(overrides)


@pytest.mark.parametrize(
    ("command", "overrides", "named"),
    [
        ("prepare", ["data.source=null"], "data.source"),
        ("prepare", ["data.buckets=[]"], "data.buckets"),
        ("fit", ["model.path=null"], "model.path"),
        ("inspect", [], "inspect.file"),
        ("sample", ["mode=a2v"], "sample.audio"),
    ],
)
def test_what_a_command_needs_is_asked_for_before_it_starts(command: str, overrides: list[str], named: str) -> None:
    made = config.compose_config(overrides)
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        config.require(made, command)
    config.require(config.compose_config(["model.weights=random", "model.path=null"]), "fit")


def test_an_unset_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.root"):
        config.compose_config(["experiment=talking_head_22b"])


def test_what_is_dumped_can_be_loaded(tmp_path: Path) -> None:
    made = config.compose_config(["experiment=audio_reference", "optim.lr=0.123"])
    (tmp_path / "config.yaml").write_text(config.dump(made))
    assert config.load(tmp_path / "config.yaml") == made


def test_a_foreign_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match="not a configuration of this release"):
        config.load(tmp_path / "config.yaml")


def test_drift_is_sorted_into_harmless_and_refused(tmp_path: Path) -> None:
    old = config.compose_config([])
    harmless = config.compose_config(["optim.steps=5", "logger.every=3", "data.workers=1"])
    assert len(config.refuse_drift(old, harmless, tmp_path)) == 3
    for change in ("optim.lr=1", "run.seed=3", "adapter.rank=8", "mode=a2v", "data.caption=x"):
        with pytest.raises(ConfigError, match="another configuration"):
            config.refuse_drift(old, config.compose_config([change]), tmp_path)


def test_a_users_own_tree(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [audio_reference, _self_]\noptim: {steps: 7}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert config.compose_config(["experiment=mine"], str(tmp_path)).optim.steps == 7
