from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_train.contracts import Clip, Condition, ConditionKind, Mode
from ltx_train.data import index
from ltx_train.evaluation import heldout, kept, ranking, report, verdicts
from ltx_train.evaluation.attention_mass import Mass
from ltx_train.evaluation.kept import Evaluated
from ltx_train.evaluation.rows import BASE, CORRECT, DROPPED, WRONG, Grid, Row, gained, paired, summary
from ltx_train.evaluation.statistics import by_identity
from ltx_train.model import adapter, attention, load_transformer
from tests.conftest import TINY


def test_student_interval_by_hand() -> None:
    """Means 1 and 3: standard error 1, t(0.975, 1 degree) = 12.706."""
    found = by_identity({"a": [0.0, 2.0], "b": [3.0]})
    assert found.mean == 2
    assert found.half == pytest.approx(12.706, abs=1e-3)
    assert not found.excludes_zero
    assert math.isnan(by_identity({"a": [1.0]}).half)
    assert not by_identity({"a": [1.0]}).excludes_zero
    assert by_identity({}).identities == 0


def test_clips_of_one_identity_do_not_narrow_the_interval() -> None:
    few, many = by_identity({"a": [1.0], "b": [2.0]}), by_identity({"a": [1.0] * 50, "b": [2.0] * 50})
    assert few == many


def row(key: str, arm: str, loss: float, sigma: float = 0.5) -> Row:
    return Row(key=key, speaker=key[0], sigma=sigma, arm=arm, loss=loss, video=loss, audio=math.nan)


def test_pairs_share_sample_and_noise_level() -> None:
    rows = [row("a1", CORRECT, 1.0), row("a1", WRONG, 1.5), row("a1", WRONG, 2.5)]
    rows += [row("b1", CORRECT, 2.0), row("b1", WRONG, 4.0)]
    gap = paired(rows, CORRECT, WRONG)
    assert gap.mean == pytest.approx(-1.5)
    assert gap.identities == 2
    assert "val/loss_audio" not in summary(rows, Grid((), (0.5,)))


SETTINGS = heldout.MeasurementSettings(
    mode=Mode(conditions=[Condition(kind=ConditionKind.reference)]),
    levels=(0.3, 0.9),
    seed=5,
    batch_size=2,
    max_samples=0,
    wrong_references=2,
    video_weight=1.0,
    audio_weight=1.0,
)


def test_measuring_is_repeatable_and_leaves_no_trace(prepared: Path) -> None:
    model = load_transformer(TINY)
    adapter.attach(model, adapter.Lora(rank=2, alpha=2, dropout=0.5, targets=("attn1.to_q",)), 0)
    model.train()
    state = torch.get_rng_state()
    data = index.load(prepared)
    first = heldout.measure(model, str(prepared), data, SETTINGS, device=torch.device("cpu"), with_base=True)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    torch.manual_seed(99)
    assert heldout.measure(model, str(prepared), data, SETTINGS, device=torch.device("cpu"), with_base=True) == first
    clips, sigmas = len(data.split("heldout")), 2
    assert len(first) == clips * sigmas * 2 * (1 + 1 + 2)


def test_an_untouched_adapter_gains_exactly_nothing(prepared: Path) -> None:
    model = load_transformer(TINY)
    adapter.attach(model, adapter.Lora(rank=2, alpha=2, dropout=0.0, targets=("attn1.to_q",)), 0)
    rows = heldout.measure(
        model, str(prepared), index.load(prepared), SETTINGS, device=torch.device("cpu"), with_base=True
    )  # fmt: skip
    assert paired(rows, CORRECT, BASE).mean == 0
    assert paired(rows, CORRECT, WRONG).mean != 0
    for other in (WRONG, DROPPED):
        assert gained(rows, other).mean == 0
        assert gained(rows, other).half == 0


def test_a_part_of_the_split_has_as_many_identities_as_it_can(prepared: Path) -> None:
    data = index.load(prepared)
    whole = heldout.heldout_records(data, SETTINGS)
    assert len(whole) == len(data.split("heldout"))
    people = len({r.speaker for r in whole})
    few = heldout.heldout_records(data, replace(SETTINGS, max_samples=people))
    assert len({r.speaker for r in few}) == people
    assert heldout.passes(data, replace(SETTINGS, max_samples=people), with_base=True) == (people, 2, 2 * (1 + 1 + 2))


def test_the_share_of_attention_is_what_attention_gives_to_an_indicator() -> None:
    """Scaled dot-product attention over values that are 1 at the references and 0 elsewhere is that share."""
    module = load_transformer(TINY).transformer_blocks[0].audio_attn1
    stream = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(2, 14, 32, generator=stream), 9
    angles = torch.randn(2, 4, 14, 4, generator=stream)
    rotary = (angles.cos(), angles.sin())
    bias = torch.zeros(2, 1, 1, 14)
    bias[1, ..., 11:] = -1.0
    rows = torch.arange(targets)
    found = attention.key_mass(module, hidden, rotary, bias=bias, rows=rows, first_key=targets)
    query, key = (
        attention.rotated(norm(layer(hidden)).unflatten(-1, (4, 8)), rotary).transpose(1, 2)
        for norm, layer in ((module.norm_q, module.to_q), (module.norm_k, module.to_k))
    )
    shown = torch.zeros(2, 4, 14, 1)
    shown[:, :, targets:] = 1
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, rows], key, shown, attn_mask=bias)
    assert found == pytest.approx(float(expected.mean()), abs=1e-6)
    assert attention.key_mass(module, hidden, rotary, bias=None, rows=rows, first_key=0) == pytest.approx(1, abs=1e-6)


def test_batch_size_does_not_change_the_numbers(prepared: Path) -> None:
    model, data = load_transformer(TINY), index.load(prepared)
    first, second = (
        heldout.measure(
            model, str(prepared), data, replace(SETTINGS, batch_size=n), device=torch.device("cpu"), with_base=False
        )
        for n in (1, 3)
    )
    by_place = {(r.key, r.sigma, r.arm): r.loss for r in second if r.arm != WRONG}
    for r in first:
        if r.arm != WRONG:
            assert by_place[r.key, r.sigma, r.arm] == pytest.approx(r.loss, rel=1e-5)


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    rows = [
        row(k, arm, v) for k, arm, v in (("a", CORRECT, 1.0), ("a", WRONG, 2.0), ("b", CORRECT, 1.0), ("b", WRONG, 2.2))
    ]
    metrics = [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": 1.0, "val/reference_gap": -1.0, "val/reference_gap_ci95": 0.1},
    ]
    (tmp_path / "clip.mp4").write_bytes(b"film")
    (tmp_path / "clip.jpg").write_bytes(b"poster")
    masses = [Mass(0, 0.5, 0.4, 0.5), Mass(1, 0.5, 0.6, 0.5)]
    said = [verdicts.Verdict(verdicts.Kind.reference_used, "used & seen")]
    shown = report.Report(
        title="a <title>", facts={"k": "<v>"}, metrics=metrics, grid=Grid((), (0.5,)), verdicts=said,
        subjects=[report.Subject(name="step 2", step=2, rows=rows, masses=masses)],
        clips={"a: <hello>\x1b[2J\u202eolleh": [Clip("<base>", tmp_path / "clip.mp4")]},
    )  # fmt: skip
    report.write(tmp_path / "r.html", shown)
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 5
    assert 'src="data:video/mp4;base64,' in page
    assert 'poster="data:image/jpeg;base64,' in page
    assert page.index("data:video/mp4") < page.index("used &amp; seen") < page.index("data:image/svg"), "clips on top"
    for wanted in ('name="viewport"', "prefers-color-scheme: dark", "@media print"):
        assert wanted in page
    assert report.page(shown) == page, "equal figures"
    assert "a: &lt;hello&gt;\ufffd[2J\ufffdolleh" in page
    for escaped in ("&lt;base&gt;", "a &lt;title&gt;", "&lt;v&gt;"):
        assert escaped in page
    assert "http" not in page.replace('charset="utf-8"', "")


def test_checkpoints_are_a_table_with_the_best_marked(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/step-000020.safetensors").write_bytes(b"x")
    few = {"val/measured_on": 2.0, "val/clips": 3.0, "val/levels": 1.0}
    listed = ranking.ranked(
        [{"step": 10, "val/loss": 2.0}, {"step": 20, "val/loss": 1.5, "val/gained_gap": -0.25, "val/loss_ci95": 0.1},
         {"step": 20, "val/loss": 0.5, **few}], tmp_path,
    )  # fmt: skip
    shown = report.Report(
        title="t", facts={}, metrics=[], subjects=[], grid=Grid((), (0.5,)), ranking=listed,
        commands=["ltx-train export <run>"],
    )  # fmt: skip
    page = report.page(shown)
    assert page.count('class="best"') == 1
    assert '<tr class="best"><th>20</th><td>1.5000 ± 0.1000</td><td></td><td>-0.2500</td>' in page
    assert page.index("<th>10</th>") < page.index("3 clips x 1 levels") < page.index("ltx-train export &lt;run&gt;")
    assert "nan" not in page


def test_an_evaluation_is_kept_whole_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    rows = [row("a", CORRECT, 1.0), row("b", WRONG, float("nan"))]
    kept.record(tmp_path, Evaluated(step=3, rows=rows, masses=[Mass(0, 0.5, 0.4, 0.5)], grid=Grid((0.5,), (0.1, 0.9)),
                                    likeness=None, by_clip=True))  # fmt: skip
    found = kept.read(tmp_path)
    assert found is not None
    assert repr(found.rows) == repr(rows), "nan is not equal to itself"
    assert (found.step, found.masses, found.grid.levels) == (3, [Mass(0, 0.5, 0.4, 0.5)], (0.1, 0.5, 0.9))
    assert found.by_clip
    path = tmp_path / kept.NAME
    path.write_bytes(path.read_bytes().replace(b"correct", b"correcd"))
    assert kept.read(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [{"levels": (0.4, 0.9)}, {"seed": 9}, {"max_samples": 2}, {"wrong_references": 1}, {"dropped": False},
     {"audio_weight": 0.5}, {"voice_variant": "noise"}, {"mode": Mode()}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_setting_of_a_measurement_is_in_its_digest(change: dict[str, Any], prepared: Path) -> None:
    data = index.load(prepared)
    first = heldout.measured_on(data, SETTINGS, SETTINGS.levels)
    assert first == heldout.measured_on(index.load(prepared), replace(SETTINGS), SETTINGS.levels)
    assert first["val/clips"] == len(data.split("heldout"))
    assert float(first["val/measured_on"]) == first["val/measured_on"] > 0
    changed = replace(SETTINGS, **change)
    assert heldout.measured_on(data, changed, changed.levels)["val/measured_on"] != first["val/measured_on"]
    assert heldout.measured_on(data, SETTINGS, SETTINGS.levels[:1])["val/measured_on"] != first["val/measured_on"]
    assert heldout.measured_on(data, replace(SETTINGS, batch_size=1), SETTINGS.levels) == first
