"""What a measurement compares beyond the wrong reference: neutral references, other noise, strengths of the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_train import config, terminal
from ltx_train.assembly import from_config, neutral_references
from ltx_train.assembly.heldout_measurement import Measurement
from ltx_train.assembly.setup import settled
from ltx_train.contracts import Condition, ConditionKind, ModalityName
from ltx_train.data import index
from ltx_train.evaluation import heldout
from ltx_train.evaluation.rows import BASE, CORRECT, NEUTRAL, OFF, WRONG, Row, gained, has, noise, paired, summary
from ltx_train.evaluation.verdicts import of_rows
from ltx_train.model import adapter, load_transformer
from ltx_train.model.transformer import Transformer
from tests.conftest import TINY, settings

VOICE = "reference/audio/speaker"


@pytest.fixture(scope="module")
def measurement(prepared: Path, clips: Path) -> Measurement:
    more = ("eval.quantiles=0", "eval.sigmas=[0.5]", "eval.strengths=[0.5,1,2]", "eval.repeats=1", f"model.path={TINY}")
    setup = settled(config.compose_config(settings(prepared, clips, *more)))
    data = index.load(prepared)
    return Measurement(
        setup=setup, root=prepared, index=data, neutral=neutral_references.of_heldout(setup, prepared, data)
    )


@pytest.fixture(scope="module")
def trained() -> Transformer:
    """With an adapter that changes something."""
    model = load_transformer(TINY)
    adapter.attach(model, adapter.Lora(rank=2, alpha=2, dropout=0.0, targets=("audio_attn1.to_v",)), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def test_a_neutral_voice_is_encoded_silence_of_the_references_length(measurement: Measurement) -> None:
    (((name, shape), latent),) = measurement.neutral.items()
    assert (name, shape) == (VOICE, tuple(latent.shape))
    assert bool(torch.isfinite(latent).all())
    assert torch.allclose(latent[:, 8], latent[:, 12], atol=0.1), "nothing changes in time"


def test_the_neutral_arm_replaces_the_references_alone(measurement: Measurement, trained: Transformer) -> None:
    rows = measurement.rows(trained)
    for arm in (NEUTRAL, OFF[NEUTRAL]):
        assert has(rows, arm)
    effect = paired(rows, CORRECT, NEUTRAL)
    assert effect.mean not in (0, paired(rows, CORRECT, WRONG).mean)
    values = summary(rows, measurement.grid)
    assert values["val/reference_gap_neutral"] == effect.mean
    assert values["val/gained_gap_neutral"] == pytest.approx(effect.mean - values["val/base_gap_neutral"])
    assert any("Against a neutral one" in verdict.text for verdict in of_rows(rows, measurement.grid))


def test_without_encoders_the_arm_is_left_out_with_a_line(
    prepared: Path, clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = settled(config.compose_config(settings(prepared, clips, f"model.path={TINY}")))
    monkeypatch.setattr(neutral_references, "_of", lambda *_: (_ for _ in ()).throw(OSError("no audio VAE")))
    data = index.load(prepared)
    assert neutral_references.of_heldout(setup, prepared, data) == {}
    assert "no neutral references: no audio VAE; measured without that arm" in capsys.readouterr().err
    with_arm = Measurement(setup=setup, root=prepared, index=data, neutral={(VOICE, (1,)): torch.zeros(1)})
    without = Measurement(setup=setup, root=prepared, index=data)
    assert with_arm.measured_on != without.measured_on, "other arms are another measurement"


def test_a_control_video_is_compared_with_grey_pictures() -> None:
    from ltx_train.assembly import encoder_builder

    encoders = encoder_builder.encoders(config.compose_config([f"model.path={TINY}"]), with_text=False)
    condition = Condition(kind=ConditionKind.reference, source="control", modality=ModalityName.video)
    latent = neutral_references._of(condition, (encoders.video_vae.config.latent_channels, 2, 2, 2), encoders)
    assert latent.shape[1:] == (2, 2, 2)
    assert bool(torch.isfinite(latent).all())


def test_other_noise_tells_how_far_a_repeated_measurement_is(measurement: Measurement, trained: Transformer) -> None:
    rows = measurement.rows(trained)
    found = measurement.repeated(trained, rows)
    assert set(found) == {"val/adapter_gain_noise", "val/gained_gap_noise"}
    assert all(value > 0 for value in found.values())
    said = [verdict.text for verdict in of_rows(rows, measurement.grid, noise=found)]
    assert f"changes by about {found['val/adapter_gain_noise']:.4f}" in said[0]
    assert f"changes by about {found['val/gained_gap_noise']:.4f}" in said[1]


def test_noise_is_the_standard_deviation_of_the_effects() -> None:
    def measured(gain: float) -> list[Row]:
        values = ((CORRECT, 1 + gain), (BASE, 1.0))
        return [Row(key="a", speaker="a", sigma=0.5, arm=arm, loss=v, video=v, audio=v) for arm, v in values]

    assert noise([measured(-0.1)]) == {}
    assert noise([measured(-0.1), measured(-0.3)]) == {"val/adapter_gain_noise": pytest.approx(0.02**0.5)}


def test_strengths_go_from_the_base_over_the_adapter(measurement: Measurement, trained: Transformer) -> None:
    rows = measurement.rows(trained)
    swept = measurement.by_strength(trained, rows)
    assert list(swept) == [0, 0.5, 1, 2]
    gains = {strength: paired(some, CORRECT, BASE).mean for strength, some in swept.items()}
    assert gains[0] == 0 == gained(swept[0], WRONG).mean
    assert gains[1] == paired(rows, CORRECT, BASE).mean
    assert 0 < abs(gains[0.5]) < abs(gains[1]) < abs(gains[2])
    assert measurement.rows(trained)[0] == rows[0], "the strength is what it was"


def test_arms_are_counted_and_part_of_the_digest(prepared: Path, clips: Path) -> None:
    composed = config.compose_config(settings(prepared, clips))
    data = index.load(prepared)
    given = from_config.measurement_settings(composed, from_config.grid(composed, data))
    without = replace(given, neutral=False)
    assert given.neutral
    counts = [heldout.passes(data, s, with_base=True)[2] for s in (given, without)]
    assert counts[0] == counts[1] + 2
    assert heldout.measured_on(data, given, [0.5]) != heldout.measured_on(data, without, [0.5])
    assert heldout.measured_on(data, given, [0.5]) != heldout.measured_on(data, replace(given, repeat=1), [0.5])


@pytest.mark.parametrize("terminal_there", [True, False])
def test_measuring_is_counted_on_a_terminal_and_silent_elsewhere(
    terminal_there: bool, measurement: Measurement, trained: Transformer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal_there)
    measurement.rows(trained)
    shown = capsys.readouterr().err
    assert ("measuring" in shown and " left" in shown) == terminal_there
    assert bool(shown) == terminal_there


def test_one_display_is_shared_and_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with terminal.shown() as outer, terminal.counted("inner", 2) as advance:
        advance()
        with terminal.shown() as again:
            assert again is outer
    assert terminal._shown == []
    monkeypatch.setattr(terminal, "_silenced", [True])
    with terminal.shown() as silent:
        assert silent is None
