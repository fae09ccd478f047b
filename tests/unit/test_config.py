from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ltx_train import config
from ltx_train.contracts import ConfigError, DataError


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


CONDITIONS = "mode.conditions"
DEEPSPEED_FULL = ("strategy=deepspeed_zero1", "optim=adamw", "adapter=full", "memory=none")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy=ddp", "adapter=full", "memory=none"], "take strategy=zero2 or zero3"),
        (["strategy=zero3_offload"], "strategy.offload moves the optimizer state that a full fine-tune slices"),
        (["strategy=zero1", "optim=adamw8bit"], "strategy=zero1 updates slices of the weights"),
        (
            ["strategy=zero3_offload", "optim=adamw", "adapter=full", "memory=none", "memory.graphs=true"],
            "passes in which the host accumulates gradients",
        ),
        (["strategy=zero3", "memory.stream_blocks=2"], "memory.stream_blocks is for blocks in host memory"),
        (["strategy.sequence=2"], "strategy.sequence needs several devices"),
        (["strategy=deepspeed_zero2", "optim=adamw", "optim.skip_spikes=10"], "skips non-finite gradients alone"),
        (["strategy=deepspeed_zero3", "optim=adamw", "memory.stream_blocks=1"], "is for blocks in host memory"),
        ([*DEEPSPEED_FULL, "memory.graphs=true"], "cannot be recorded as CUDA graphs"),
        ([*DEEPSPEED_FULL, "memory.offload_inputs=true"], "hold the inputs of blocks"),
        (["strategy=deepspeed_zero3", "optim=adamw", "strategy.hpz=2"], "strategy.hpz is for full fine-tunes"),
        (["strategy=deepspeed_zero3", "optim=adamw8bit"], "strategy=zero3 updates slices of the weights"),
        (["strategy=ddp", "strategy.engine=deepspeed"], "strategy=ddp does not: set strategy=zero3"),
        (["strategy=zero3", "strategy.engine=own", "strategy.hpz=2"], "strategy.hpz are for DeepSpeed"),
        (["strategy=ddp", "strategy.deepspeed={a: 1}"], "strategy.hpz are for DeepSpeed"),
        (["strategy=ddp", "strategy.devices=3", "strategy.sequence=2"], "3 devices do not make groups of 2"),
        (["strategy=ddp", "strategy.devices=4", "strategy.sequence=6"], "4 devices do not make groups of 6"),
        (["strategy=ddp", "strategy.sequence=2", "memory.graphs=true"], "passes in which ranks exchange tokens"),
        (["strategy.devices=2"], "strategy.devices=2 needs strategy=ddp, zero1, zero2, zero3"),
        (["mode=i2v", "data.buckets=[64x64x1]"], "first_frame: 64x64x1 has one frame"),
        (["mode=extend", "mode.conditions.0.latents=[5]"], "prefix may give 5 of the 5 video latents of 64x64x33"),
        (["mode=extend", "mode.conditions.0.latents=[3,1]"], "must be [n] or [lowest, highest]"),
        (["mode=extend", "mode.conditions.0.latents=[]"], "must be [n] or [lowest, highest]"),
        (["mode=audio_extend", "mode.conditions.0.latents=[40]"], "may give 40 of the 33 audio latents"),
        (["mode=outpaint", "mode.conditions.0.region=[0,0,33,64]"], "multiples of 32 pixels"),
        (["mode=outpaint", "mode.conditions.0.region=[0,0,64,64]"], "is all of 64x64x33"),
        (["mode=outpaint", "mode.conditions.0.region=[0,0,96,32]"], "does not lie within 64x64x33"),
        (["mode=outpaint", "data.buckets=[32x32x33]"], "single latent wide and high"),
        (
            ["mode=inpaint", "mode.conditions.0.source=speaker"],
            "name the tensor in the shards",
        ),
        (["mode=v2v_ic", "mode.conditions.0.sigmas=[0.9,0.1]"], "[lowest, highest] within [0, 1]"),
        (["mode=v2v_ic", "mode.conditions.0.strength=2"], "must lie in [0, 1]"),
        (["mode=v2v_ic", "mode.conditions.0.spatial_scale=0"], "spatial_scale and temporal_scale at least 1"),
        (
            ["mode=a2v", f"{CONDITIONS}=[{{kind: prefix, modality: audio, latents: [2]}}]"],
            "prefix needs mode.audio=generate",
        ),
        (["mode=t2av", f"{CONDITIONS}=[{{kind: first_frame, modality: audio}}]"], "first_frame is about pictures"),
        (["mode=t2v", "adapter=cross_modal"], "cross_modal names layers that mode.audio=absent gives no loss"),
        (["mode=t2a", "adapter=video_only"], "video_only names layers that mode.video=absent gives no loss"),
        (["adapter.targets=[to_kk]"], "no layer's name ends with 'to_kk'; did you mean 'to_k'"),
        (["adapter.rank_pattern={attn7: 4}"], "no layer's name ends with 'attn7'"),
        (["adapter=full", "adapter.ema=0.9"], "adapter.ema is for adapter.kind=lora"),
        (["mixture={nosuch: 1}"], "there is no mode 'nosuch'"),
        (["mixture={t2av: 0, a2v: 0}"], "one of them is above 0"),
        (["mixture={t2a: 1, t2av: 1}", "adapter=video_only", "mode=t2a"], ""),
        (["sigma.low=0.7", "sigma.high=0.2"], "sigma.low=0.7 must be below"),
        (["sigma.shift_limits=[1]"], "give [lowest, highest] of the shift"),
        (["sigma.kind=hihg"], "did you mean 'high'"),
        (["data.caption_dropout=1.5"], "data.caption_dropout=1.5: must lie in [0, 1]"),
        (["loss.token_weights={video_mask: -1}"], "video_mask weighs -1"),
        (["eval.sigmas=[]", "eval.quantiles=0"], "eval.quantiles must be at least 1"),
    ],
)
def test_modes_that_cannot_train_are_refused(overrides: list[str], expected: str) -> None:
    asked = [*overrides, "data.source=x", "data.root=y"]
    if not expected:  # one of the mixed modes trains these layers
        assert config.compose_config(asked).adapter.targets
        return
    with pytest.raises(ConfigError) as error:
        config.compose_config(asked)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("t2v", "video_only"), ("t2av", "attention"), ("v2v_ic", "video_ff"), ("a2v", "attention"),
        ("t2a", "audio_only"), ("v2a", "video_to_audio"), ("audio_reference", "cross_modal"), ("av2av_ic", "attention"),
    ],
)  # fmt: skip
def test_targets_default_from_the_mode(mode: str, expected: str) -> None:
    made, named = (
        config.compose_config([f"mode={mode}", f"adapter={name}", "data.source=x", "data.root=y"]).adapter.targets
        for name in ("auto", expected)
    )
    assert made == named


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


def test_all_missing_settings_are_named_in_one_message() -> None:
    made = config.compose_config(["experiment=talking_head_22b", "data.buckets=[]"])
    with pytest.raises(ConfigError) as error:
        config.require(made, "prepare")
    for name in ("data.source", "data.root", "data.buckets", "model.path"):
        assert f"{name} is not set: give" in str(error.value)


def test_missing_files_are_named_beside_missing_settings(tmp_path: Path) -> None:
    made = config.compose_config([f"model.path={tmp_path / 'no.safetensors'}", "data.root=x", "data.buckets=[]"])
    with pytest.raises(ConfigError, match=r"(?s)2 things are missing.*data.buckets is not set.*no checkpoint at"):
        config.require(made, "fit")
    complete = config.changed(made, {"data.buckets": ["64x64x33"]})
    with pytest.raises(DataError, match="no checkpoint at"):
        config.require(complete, "fit")


@pytest.mark.parametrize("command", ["export", "inspect", "sample", "bench", "plan", "doctor"])
def test_settings_of_other_commands_may_be_unset(command: str) -> None:
    made = config.compose_config(["experiment=talking_head_22b", "model.weights=random", f"inspect.file={__file__}"])
    config.require(made, command)


def test_what_is_dumped_can_be_loaded(tmp_path: Path) -> None:
    made = config.compose_config(["experiment=audio_reference", "optim.lr=0.123"])
    (tmp_path / "config.yaml").write_text(config.dump(made))
    assert config.load(tmp_path / "config.yaml") == made


def test_a_foreign_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match="not a configuration of this release"):
        config.load(tmp_path / "config.yaml")


def _as_omegaconf_has_them(node: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.items():
        found |= (
            _as_omegaconf_has_them(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
        )
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=talking_head_22b"],
        ["experiment=voice_reference_22b", "mixture={a2v: 1, t2a: 2}", "memory.keep=attention"],
        ["experiment=av_lora", "eval.prompts=[{prompt: x}]", "loss.token_weights={face_mask: 3}", "adapter.alpha=0.5"],
    ],
)
def test_settings_as_text_are_those_of_a_saved_configuration(words: list[str]) -> None:
    made = config.compose_config([*words, "data.root=x", "data.source=y"])
    container = OmegaConf.to_container(OmegaConf.structured(made), enum_to_str=True)
    assert config.flat(made) == _as_omegaconf_has_them(container)


def test_drift_is_sorted_into_harmless_and_refused(tmp_path: Path) -> None:
    old = config.compose_config([])
    harmless = config.compose_config(["optim.steps=5", "logger.every=3", "data.workers=1"])
    said = config.refuse_drift(old, harmless, tmp_path)
    assert [line.partition(":")[0] for line in said] == ["data.workers", "logger.every", "optim.steps"]
    assert [("warning" in line) for line in said] == [False, False, True]
    for change in ("optim.lr=1", "run.seed=3", "adapter.rank=8", "mode=a2v", "data.caption=x"):
        with pytest.raises(ConfigError, match="another configuration"):
            config.refuse_drift(old, config.compose_config([change]), tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("strategy=ddp", "not bit for bit"),
        ("memory.keep=attention", "not bit for bit"),
        ("eval.sigmas=[0.5]", "do not compare"),
        ("run.allow=[optim.lr] optim.lr=1", "another course"),
        ("eval.interval=7", ""),
        ("memory.budget_gib=9", ""),
    ],
)
def test_allowed_drift_names_its_consequence(change: str, why: str, tmp_path: Path) -> None:
    said = config.refuse_drift(config.compose_config([]), config.compose_config(change.split()), tmp_path)
    line = next(line for line in said if not line.startswith("run.allow"))
    assert ("warning" in line) == bool(why)
    assert why in line


def test_a_users_own_tree(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [audio_reference, _self_]\noptim: {steps: 7}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert config.compose_config(["experiment=mine"], str(tmp_path)).optim.steps == 7


def test_one_person_holds_out_clips() -> None:
    made = config.compose_config(["experiment=talking_head_22b", "data.source=x", "data.root=y"])
    assert (made.data.heldout_clips, made.data.heldout_speakers) == (3, 0)
