"""Verdicts on measurements: every kind of sentence, from rows made for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import Batch, Condition, ConditionKind, Mode
from ltx_train.evaluation import history, likeness, ranking, verdicts
from ltx_train.evaluation.history import Measured
from ltx_train.evaluation.rows import BASE, CAPTION, CORRECT, DROPPED, OFF, WRONG, Grid, Row, summary
from ltx_train.evaluation.verdicts import Kind
from ltx_train.training.stability.early_stop import EarlyStop

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
GRID = Grid((), LEVELS)
Loss = Callable[[float], float]
AN_ADAPTER: dict[str, Loss] = {BASE: lambda _s: 0.0}


def rows(people: int = 8, **arms: Loss) -> list[Row]:
    """Every identity's rows at every level; arms add to the loss of the correct one; identities differ a little."""
    found: list[Row] = []
    for who in range(people):
        spread = 1 + 0.1 * math.sin(who)
        for level in LEVELS:
            found.append(
                Row(key=f"c{who}", speaker=f"p{who}", sigma=level, arm=CORRECT, loss=1.0, video=1.0, audio=math.nan)
            )
            for arm, more in arms.items():
                loss = 1.0 + more(level) * spread + 0.001 * math.cos(7 * who)
                found.append(
                    Row(key=f"c{who}", speaker=f"p{who}", sigma=level, arm=arm, loss=loss, video=loss, audio=math.nan)
                )
    return found


def said(people: int = 8, alike: float | None = 0.0, **arms: Loss) -> list[Kind]:
    return [v.kind for v in verdicts.of_rows(rows(people, **arms), GRID, alike)]


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ({BASE: lambda _s: 0.2}, [Kind.adapter_helps]),
        ({BASE: lambda _s: -0.2}, [Kind.adapter_hurts]),
        ({BASE: lambda _s: 0.0}, [Kind.adapter_no_effect]),
        ({WRONG: lambda _s: 0.3, DROPPED: lambda _s: 0.2}, [Kind.reference_used]),
        ({WRONG: lambda s: 0.3 if s > 0.8 else 0.01}, [Kind.reference_leaked]),
        ({WRONG: lambda _s: 0.0}, [Kind.reference_decorative]),
        # Beyond its interval, but a thousandth of the loss: no effect in practice.
        ({WRONG: lambda _s: 0.003}, [Kind.reference_decorative]),
        ({WRONG: lambda _s: -0.3}, [Kind.reference_misleads]),
        ({WRONG: lambda _s: 0.0, CAPTION: lambda _s: 0.4}, [Kind.caption_carries]),
        ({CAPTION: lambda _s: 0.4}, [Kind.caption_carries]),
        # The base does by itself what the adapter seems to do.
        ({**AN_ADAPTER, WRONG: lambda _s: 0.3, OFF[WRONG]: lambda _s: 0.3}, [Kind.reference_is_the_bases]),
        ({**AN_ADAPTER, WRONG: lambda _s: 0.5, OFF[WRONG]: lambda _s: 0.2}, [Kind.reference_used]),
        (
            {**AN_ADAPTER, WRONG: lambda s: 0.6 if s > 0.8 else 0.21, OFF[WRONG]: lambda _s: 0.2},
            [Kind.reference_leaked],
        ),
        ({**AN_ADAPTER, WRONG: lambda _s: 0.1, OFF[WRONG]: lambda _s: 0.4}, [Kind.reference_unlearned]),
        ({**AN_ADAPTER, WRONG: lambda _s: -0.3, OFF[WRONG]: lambda _s: 0.1}, [Kind.reference_misleads]),
        ({**AN_ADAPTER, WRONG: lambda _s: 0.0, OFF[WRONG]: lambda _s: 0.0}, [Kind.reference_decorative]),
        (
            {
                **AN_ADAPTER,
                WRONG: lambda _s: 0.0,
                OFF[WRONG]: lambda _s: 0.0,
                CAPTION: lambda _s: 0.4,
                OFF[CAPTION]: lambda _s: 0.1,
            },
            [Kind.caption_carries],
        ),
        (
            {
                **AN_ADAPTER,
                WRONG: lambda _s: 0.3,
                OFF[WRONG]: lambda _s: 0.3,
                CAPTION: lambda _s: 0.4,
                OFF[CAPTION]: lambda _s: 0.4,
            },
            [Kind.reference_is_the_bases],
        ),
        ({CAPTION: lambda _s: 0.0}, []),
    ],
)
def test_every_kind_of_verdict(arms: dict[str, Loss], expected: list[Kind]) -> None:
    assert [kind for kind in said(**arms) if BASE not in arms or len(arms) == 1 or "adapter" not in kind] == expected


def test_copies_and_single_identities_are_no_proof() -> None:
    assert said(alike=0.97, **{WRONG: lambda _s: 0.5}) == [Kind.reference_is_target]
    assert said(people=1, **{WRONG: lambda _s: 0.5, BASE: lambda _s: 0.5}) == [Kind.too_few_identities] * 2
    assert [v.kind for v in verdicts.of_rows([], GRID)] == [Kind.nothing_heldout]


def test_the_sentence_has_the_number_with_its_interval() -> None:
    (found,) = verdicts.of_rows(rows(**{WRONG: lambda _s: 0.3}), GRID)
    assert "-0.3" in found.text
    assert "±" in found.text
    assert "(8 identities)" in found.text
    assert re.search(r", -(29|30|31)\.\d % of the loss", found.text)


def test_what_the_base_does_stands_beside_what_the_adapter_gained() -> None:
    (_, found) = verdicts.of_rows(rows(**AN_ADAPTER, **{WRONG: lambda _s: 0.5, OFF[WRONG]: lambda _s: 0.2}), GRID)
    assert re.match(r"Gained gap: -0\.(29|30|31)\d\d ± .* with the adapter, -0\.5\d\d\d, minus that of the base, "
                    r"-0\.2\d\d\d\. The adapter uses the reference", found.text)  # fmt: skip
    (_, none) = verdicts.of_rows(rows(**AN_ADAPTER, **{WRONG: lambda _s: 0.0, OFF[WRONG]: lambda _s: 0.0}), GRID)
    assert "About 24 more held-out identities would halve the interval." in none.text
    single = verdicts.of_rows(rows(1, **AN_ADAPTER, **{WRONG: lambda _s: 0.5, OFF[WRONG]: lambda _s: 0.2}), GRID)
    assert all("nan" not in verdict.text for verdict in single)
    assert "(one identity: no interval)" in single[1].text


def course(*losses: float, people: int = 6) -> list[Measured]:
    return [
        Measured(100 * (n + 1), {f"p{w}": loss + 0.05 * w + 0.002 * math.sin(3 * w + n) for w in range(people)})
        for n, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "training", "expected"),
    [
        ((1.0, 0.8, 0.7, 0.6, 0.5, 0.4), (1.0, 0.8, 0.7, 0.6, 0.5, 0.4), Kind.improving),
        ((1.0, 0.7, 0.5, 0.6, 0.8, 0.9), (1.0, 0.7, 0.5, 0.4, 0.3, 0.2), Kind.overfitting),
        ((1.0, 0.6, 0.5, 0.5, 0.5, 0.5), (1.0, 0.6, 0.5, 0.5, 0.5, 0.5), Kind.plateau),
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0, 1.0), Kind.not_learning),
    ],
)
def test_the_course_of_a_run(losses: tuple[float, ...], training: tuple[float, ...], expected: Kind) -> None:
    logged = {100 * (n + 1): loss for n, loss in enumerate(training)}
    (found,) = verdicts.of_history(course(*losses), logged)
    assert found.kind is expected
    assert "±" in found.text


@pytest.mark.parametrize(
    ("gap", "half", "expected"),
    [(-0.2, 0.1, Kind.reference_used), (-0.2, 0.3, Kind.reference_decorative), (0.0, 0.0, Kind.reference_decorative)],
)
def test_a_row_of_metrics_tells_whether_the_reference_is_used(gap: float, half: float, expected: Kind) -> None:
    row = {"val/loss": 1.0, "val/reference_gap": gap, "val/reference_gap_ci95": half}
    assert [v.kind for v in verdicts.of_metrics(row)] == [expected]
    # What the adapter gained counts, where the base was measured.
    gained = {"val/gained_gap": gap, "val/gained_gap_ci95": half, "val/base_gap": -0.4}
    (found,) = verdicts.of_metrics({**row, "val/reference_gap": -0.9, **gained})
    assert found.kind is expected
    assert "the base's own gap is -0.4000" in found.text
    assert verdicts.of_metrics({"val/loss": 1.0}) == []


def test_too_little_to_judge_a_course() -> None:
    assert verdicts.of_history(course(1.0), {}) == []
    (found,) = verdicts.of_history(course(1.0, 0.5, people=1), {})
    assert found.kind is Kind.too_few_identities


def test_history_keeps_each_step_once(tmp_path: Path) -> None:
    for measured in course(1.0, 0.8, 0.6):
        history.record(tmp_path, measured)
    history.record(tmp_path, Measured(200, {"p0": 0.5}))
    with (tmp_path / history.NAME).open("a") as file:
        file.write('{"step": 300, "lo')
    assert [m.step for m in history.read(tmp_path)] == [100, 200]
    assert history.read(tmp_path)[1].loss == {"p0": 0.5}
    assert history.read(tmp_path / "nowhere") == []


def test_paired_steps_are_told_apart_where_plain_means_are_not() -> None:
    """Identities differ by 0.25, the steps by 0.02: only the paired interval excludes zero."""
    first, second = course(0.52, 0.5)
    assert history.difference(second, first).excludes_zero
    assert sum(first.loss.values()) / 6 - sum(second.loss.values()) / 6 < 0.05


def batch(voice: torch.Tensor) -> Batch:
    stream = torch.Generator().manual_seed(1)
    audio = torch.randn(4, 2, 20, 16, generator=stream)
    return Batch(
        keys=("a", "b", "c", "d"),
        speakers=("a", "b", "c", "d"),
        draws=(0,) * 4,
        fps=torch.full((4,), 25.0),
        video_latent=None,
        audio_latent=audio,
        video_context=torch.zeros(4, 1, 1),
        audio_context=torch.zeros(4, 1, 1),
        references={Condition(kind=ConditionKind.reference).name: voice},
    )


def test_likeness_finds_copies_even_when_they_are_shifted() -> None:
    mode = Mode(conditions=[Condition(kind=ConditionKind.reference)])
    apart = batch(torch.randn(4, 2, 12, 16, generator=torch.Generator().manual_seed(2)))
    copied = batch(apart.audio_latent[:, :, 3:15] + 0.01)  # type: ignore[index]
    own, other = likeness.cosines(mode, copied), likeness.cosines(mode, apart)
    assert min(own) > 0.99
    assert likeness.beyond_chance(own, other) == pytest.approx(1, abs=0.01)
    assert likeness.beyond_chance(other, other) == 0
    assert likeness.beyond_chance(likeness.cosines(Mode(), apart), other) is None


def test_the_best_step_is_kept_linked_and_ends_a_run(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/step-000020.safetensors").write_bytes(b"x")
    metrics = [
        {"step": 10, "val/loss": 1.0, "val/loss_ci95": 0.1}, {"step": 20, "val/loss": 0.5, "val/adapter_gain": -0.5},
        {"step": 30, "val/loss": 0.7}, {"step": 30, "train/loss": 0.1},
    ]  # fmt: skip
    found = ranking.ranked(metrics, tmp_path)
    assert [e.step for e in found.entries] == [20, 30, 10]
    assert "step     20  0.5000" in ranking.table(found)
    assert "nan" not in ranking.table(found)
    link = ranking.link(found, tmp_path)
    assert link is not None
    assert link.read_bytes() == b"x"
    assert ranking.link(ranking.ranked([], tmp_path), tmp_path) is None
    selection = EarlyStop(patience=2)
    assert [selection.record(int(m["step"]), m) for m in metrics] == [True, True, False, False]
    assert selection.reason is None
    again = EarlyStop(patience=2)
    again.restore(selection.state())
    assert not again.record(40, {"val/loss": 0.6})
    assert again.reason is not None
    assert "step 20" in again.reason
    assert EarlyStop(0).reason is None


def test_summary_names_every_difference_with_its_interval() -> None:
    found = summary(rows(**{WRONG: lambda _s: 0.3, DROPPED: lambda _s: 0.2, BASE: lambda _s: 0.1}), GRID)
    for name, value in (("reference_gap", -0.3), ("reference_gap_dropped", -0.2), ("adapter_gain", -0.1)):
        assert found[f"val/{name}"] == pytest.approx(value, abs=0.02)
        assert found[f"val/{name}_ci95"] > 0
    assert "val/loss_uniform" not in found
    assert not any("gained" in name or "base" in name for name in found)
    own = {WRONG: lambda _s: 0.5, OFF[WRONG]: lambda _s: 0.2, CAPTION: lambda _s: 0.1, OFF[CAPTION]: lambda _s: 0.4}
    gained = summary(rows(**AN_ADAPTER, **own), GRID)
    for name, value in (
        ("reference_gap", -0.5), ("base_gap", -0.2), ("gained_gap", -0.3), ("gained_gap_sigma/0.3", -0.3),
        ("caption_gap", -0.1), ("base_caption_gap", -0.4), ("gained_caption_gap", 0.3),
    ):  # fmt: skip
        assert gained[f"val/{name}"] == pytest.approx(value, abs=0.02)
    assert gained["val/gained_gap_ci95"] < gained["val/reference_gap_ci95"], "people differ less in what is gained"
    both = summary(rows(), Grid((0.1, 0.5), (0.3, 0.9)))
    assert both["val/loss_uniform"] == pytest.approx(1.0)


def on(step: int, loss: float, grid: int, clips: int = 16, levels: int = 14) -> dict[str, float]:
    return {"step": step, "val/loss": loss, "val/measured_on": grid, "val/clips": clips, "val/levels": levels}


def test_a_measurement_on_another_grid_ranks_nothing(tmp_path: Path) -> None:
    """Steps 20, 40 and 42 of one grid; 20 and 40 once more on few levels, where losses are lower."""
    (tmp_path / "adapters").mkdir()
    for step in (20, 40, 42):
        (tmp_path / f"adapters/step-{step:06d}.safetensors").write_bytes(b"%d" % step)
    metrics = [
        on(20, 53.4230, 1), on(40, 53.3425, 1), on(40, 52.1085, 2, clips=3, levels=3), on(20, 52.2737, 2, 3, 3),
        on(42, 53.3392, 1),
    ]  # fmt: skip
    found = ranking.ranked(metrics, tmp_path)
    assert [(e.step, e.loss) for e in found.entries] == [(42, 53.3392), (40, 53.3425), (20, 53.4230)]
    link = ranking.link(found, tmp_path)
    assert link is not None
    assert link.read_bytes() == b"42"
    table = ranking.table(found)
    first, _, second = table.partition("measured on 3 clips x 3 levels, not comparable with these:")
    assert "52.1" not in first
    assert second.index("52.1085") < second.index("52.2737")


def test_another_grid_neither_ends_a_run_nor_is_its_best() -> None:
    selection = EarlyStop(patience=2)
    assert [selection.record(step, on(step, loss, 1)) for step, loss in ((1, 1.0), (2, 1.1))] == [True, False]
    assert selection.record(3, on(3, 5.0, 2)), "the first of a measurement is the best of it"
    assert selection.reason is None
    again = EarlyStop(patience=2)
    again.restore(selection.state())
    assert not again.record(4, on(4, 5.1, 2))
    assert again.best_step == 3


def test_a_course_compares_steps_of_one_grid() -> None:
    falling = [replace(m, on=1) for m in course(1.0, 0.8)]
    other = [replace(m, step=m.step + 1000, on=2) for m in course(0.3, 0.25, 0.2)]
    (found,) = verdicts.of_history([*falling, *other], {})
    assert "since step 1100" in found.text
    assert verdicts.of_history([*falling, other[0]], {}) == []
