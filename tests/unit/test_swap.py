"""The swap test distinguishes outputs that follow a reference, outputs that only change with it, and others."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ltx_train import config
from ltx_train.assembly.setup import settled
from ltx_train.assembly.swap_test import SwapTest
from ltx_train.contracts import Clip, ConfigError
from ltx_train.data import index
from ltx_train.data.prepare.sound import read_audio
from ltx_train.evaluation import swap, swap_page, traits
from ltx_train.evaluation.swap import DROPPED, OFF, ON, Aspect, Measure, Output
from ltx_train.evaluation.traits import Traits
from ltx_train.evaluation.verdicts import Kind
from tests.conftest import REPOSITORY, command, settings

NAMES = [f"speaker{n}" for n in range(6)]
REFERENCES = {
    who: Traits(semitones=40.0 + 4 * n, voiced=0.9, spectrum=tuple(np.random.default_rng(n).normal(size=40)))
    for n, who in enumerate(NAMES)
}


def outputs(follows: float, changes: float, arm: str = ON, strengths: tuple[float, ...] = (1.0,)) -> list[Output]:
    """follows: share of a reference's voice in the output. changes: how far a reference moves the latents, where 1 is
    as far as a seed does."""
    made: list[Output] = []
    for strength in strengths:
        for number, who in enumerate(NAMES):
            for seed in (1, 2):
                noise = np.random.default_rng([seed])
                own = np.random.default_rng([99, number])
                latent = noise.normal(size=400) + changes * own.normal(size=400)
                jitter = np.random.default_rng([seed, number]).normal(size=41) * 0.2
                target = REFERENCES[who]
                spectrum = follows * strength * np.asarray(target.spectrum) + jitter[1:]
                voice = Traits(
                    semitones=50 + follows * strength * (target.semitones - 50) + jitter[0],
                    voiced=0.9 if strength <= 1 else 0.2, spectrum=tuple(spectrum),
                )  # fmt: skip
                made.append(
                    Output(
                        arm=arm, reference=who, prompt="p", seed=seed, latent=latent, traits=voice, strength=strength
                    )
                )
    return made


def test_the_share_of_a_voice_that_is_taken_over_is_measured() -> None:
    for share in (0.0, 0.4, 1.0):
        made = outputs(share, 1.0)
        moved, shape = (swap.followed(made, ON, REFERENCES, aspect) for aspect in (Aspect.pitch, Aspect.spectrum))
        assert moved.mean == pytest.approx(share, abs=0.05)
        assert shape.mean == pytest.approx(share, abs=0.05)
        assert moved.low <= moved.mean <= moved.high
        assert moved.is_above_zero == (share > 0)


def test_latents_are_compared_with_the_floor_of_the_seed() -> None:
    assert swap.distance(outputs(0, 1.0), ON).mean == pytest.approx(0, abs=0.1), "as far as a seed"
    assert swap.distance(outputs(0, 2.0), ON).is_above_zero
    assert swap.distance(outputs(0, 0.2), ON).high < 0
    assert math.isnan(swap.distance([], ON).mean)


@pytest.mark.parametrize(
    ("follows", "changes", "kind"),
    [
        (0.5, 1.0, Kind.swap_follows),
        (0.0, 3.0, Kind.swap_changes),
        (0.0, 0.1, Kind.swap_ignores),
        (-0.5, 0.1, Kind.swap_ignores),
    ],
)
def test_the_verdict_names_what_is_shown(follows: float, changes: float, kind: Kind) -> None:
    made = [*outputs(follows, changes), *outputs(0.0, changes, OFF)]
    assert swap.verdict(made, REFERENCES).kind is kind


def test_a_base_that_follows_as_well_is_not_the_adapters_doing() -> None:
    made = [*outputs(0.5, 0.1), *outputs(0.5, 0.1, OFF)]
    assert swap.verdict(made, REFERENCES).kind is Kind.swap_follows_the_base
    assert swap.gained(made, REFERENCES, Aspect.pitch).mean == 0
    more = [*outputs(0.8, 0.1), *outputs(0.5, 0.1, OFF)]
    assert swap.verdict(more, REFERENCES).kind is Kind.swap_follows
    assert swap.gained(more, REFERENCES, Aspect.spectrum).mean == pytest.approx(0.3, abs=0.02)


def test_few_speakers_give_no_verdict() -> None:
    few = dict(list(REFERENCES.items())[:2])
    assert swap.verdict([o for o in outputs(1, 1) if o.reference in few], few).kind is Kind.too_few_identities


def test_the_diagonal_is_nearest_where_outputs_follow() -> None:
    follows, ignores = (swap.matrix(outputs(share, 1.0), ON, REFERENCES) for share in (1.0, 0.0))
    assert swap.hits(follows) == (1.0, pytest.approx(1 / 6))
    assert swap.hits(ignores)[0] < 0.5
    assert np.isnan(swap.matrix([], ON, REFERENCES)).all()


def test_the_strength_at_which_a_voice_is_garbled() -> None:
    means, lost = swap.garbling(outputs(0.5, 1.0, strengths=(0.0, 0.5, 1.0, 1.5)))
    assert list(means) == [0, 0.5, 1, 1.5]
    assert lost == 1.5
    assert swap.garbling(outputs(0.5, 1.0, strengths=(0.0, 1.0)))[1] is None
    moved = [
        swap.followed(outputs(0.5, 1.0, strengths=(s,)), ON, REFERENCES, Aspect.pitch, strength=s).mean
        for s in (0.5, 1.0)
    ]
    assert moved == [pytest.approx(0.25, abs=0.05), pytest.approx(0.5, abs=0.05)]


def test_every_measured_aspect_is_compared_and_others_are_not() -> None:
    """Embeddings count where both references and outputs have one."""
    assert swap.aspects(REFERENCES) == [Aspect.pitch, Aspect.spectrum]
    spoken = {who: replace(t, speaker=tuple(np.eye(6)[n])) for n, (who, t) in enumerate(REFERENCES.items())}
    assert swap.aspects(spoken) == [Aspect.pitch, Aspect.spectrum, Aspect.speaker]
    made = [
        replace(o, traits=replace(o.traits, speaker=spoken[o.reference].speaker)) for o in outputs(0.0, 1.0) if o.traits
    ]
    assert swap.followed(made, ON, spoken, Aspect.speaker).mean == pytest.approx(1.0)
    assert swap.followed(outputs(1.0, 1.0), ON, spoken, Aspect.speaker).mean != 0, "nothing was measured"
    base = [*made, *(replace(o, arm=OFF, traits=replace(o.traits, speaker=(1.0,) + (0.0,) * 5)) for o in made)]
    assert swap.gained(base, spoken, Aspect.speaker).is_above_zero
    assert swap.verdict(base, spoken).kind is Kind.swap_follows
    assert "speaker embedding" in swap.verdict(base, spoken).text


def test_log_mels_have_a_floor_of_their_own() -> None:
    made = [
        replace(o, traits=replace(o.traits, mel=tuple(o.latent[:50] * (3 if o.seed == 2 else 1))))
        for o in outputs(0.0, 1.0) if o.traits
    ]  # fmt: skip
    apart = swap.distance(made, ON, Measure.mel)
    assert np.isfinite(apart.mean)
    assert apart != swap.distance(made, ON)
    assert math.isnan(swap.distance(outputs(0.0, 1.0), ON, Measure.mel).mean), "none were measured"


def test_changed_recordings_are_apart_from_the_others() -> None:
    plain, noisy = outputs(0.8, 1.0), [replace(o, variant="noise") for o in outputs(0.3, 1.0)]
    both = [*plain, *noisy]
    for aspect in (Aspect.pitch, Aspect.spectrum):
        assert swap.followed(both, ON, REFERENCES, aspect) == swap.followed(plain, ON, REFERENCES, aspect)
        assert swap.followed(both, ON, REFERENCES, aspect, variant="noise").mean == pytest.approx(0.3, abs=0.05)
    assert swap.distance(both, ON) == swap.distance(plain, ON)
    assert swap.garbling(both) == swap.garbling(plain)
    assert np.array_equal(swap.matrix(both, ON, REFERENCES), swap.matrix(plain, ON, REFERENCES))
    section = swap_page._variants(both, REFERENCES)
    assert section is not None
    assert [row[0] for row in section.tables[0].rows] == ["as recorded", "noise"]
    assert swap_page._variants(plain, REFERENCES) is None


def test_silent_outputs_are_left_out() -> None:
    silent = [
        Output(arm=ON, reference=who, prompt="p", seed=1, latent=np.zeros(3),
               traits=Traits(semitones=float("nan"), voiced=0.0, spectrum=(0.0,) * 40)) for who in NAMES
    ]  # fmt: skip
    assert math.isnan(swap.followed(silent, ON, REFERENCES, Aspect.pitch).mean)
    assert swap.verdict([*silent, *outputs(0, 0.1, OFF)], REFERENCES).kind is Kind.swap_ignores


def test_the_page_has_clips_effects_and_matrices(tmp_path: Path) -> None:
    made = [*outputs(0.5, 1.0, strengths=(0.0, 1.0)), *outputs(0.0, 1.0, OFF)]
    (tmp_path / "c.mp4").write_bytes(b"film")
    swap_page.write(
        tmp_path / "swap.html", "a <run>", made, REFERENCES, clips={"<anna>": [Clip("reference", tmp_path / "c.mp4")]},
        verdict=swap.verdict(made, REFERENCES),
    )  # fmt: skip
    page = (tmp_path / "swap.html").read_text()
    for wanted in (
        "a &lt;run&gt;",
        "&lt;anna&gt;",
        "With the adapter the output follows",
        "pitch followed",
        "chance 17 %",
    ):
        assert wanted in page
    assert "By strength of the adapter" in page
    assert page.count("data:image/svg") == 2
    assert "http" not in page.replace('charset="utf-8"', "")
    assert "nan" not in page.partition("data:")[0]


@pytest.mark.slow
def test_pitches_of_drawn_speakers_are_measured() -> None:
    """Each has one pitch of its own, which data/make_sample.py draws from 90 Hz times 3.3 to the power of U[0, 1)."""
    for number in (1, 2, 7):
        waveform, rate = read_audio(REPOSITORY / f"data/sample/speaker{number:02d}_0.mp4")
        assert waveform is not None
        voice = traits.of_sound(waveform, rate)
        drawn = 90 * 3.3 ** np.random.default_rng([7, number]).uniform()
        assert voice.semitones == pytest.approx(12 * np.log2(drawn), abs=0.7)
        assert voice.voiced > 0.8
    silent = traits.of_sound(torch.zeros(2, 48000), 48000)
    assert math.isnan(silent.semitones)


def test_no_outputs_of_the_dropped_arm_count_as_references() -> None:
    made = outputs(0.5, 1.0)
    dropped = [Output(arm=DROPPED, reference="", prompt="p", seed=1, latent=np.zeros(400), traits=made[0].traits)]
    both = [swap.followed(some, ON, REFERENCES, Aspect.pitch) for some in (made, [*made, *dropped])]
    assert both[0] == both[1]


def test_what_has_no_voice_reference_is_refused(
    prepared: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", "swap", "mode=t2av", "data.root=gone", "run.root=gone") == 78
    assert "no checkpoint in gone" in capsys.readouterr().err
    setup = settled(config.compose_config(settings(prepared, clips, "mode=t2av")))
    with pytest.raises(ConfigError, match="for modes that generate sound with a voice reference"):
        SwapTest(setup, prepared, index.load(prepared))
    assert command("evaluate", "swap", "--help") == 0
    assert "swap.speakers" in capsys.readouterr().out
