"""docs/study/study.py runs, and its page says what its results say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

STUDY = REPOSITORY / "docs/study"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(STUDY))  # as for a script, whose own folder is searched first
    spec = importlib.util.spec_from_file_location("study", STUDY / "study.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["study"] = made  # its dataclasses look themselves up there
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def _few_people(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "IDENTITIES", 24)
    monkeypatch.setattr(study, "HELDOUT", 6)
    monkeypatch.setattr(study.swapped, "SEEDS", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_people")
def test_a_copy_is_called_one_after_a_short_training(study: ModuleType, tmp_path: Path) -> None:
    found = {}
    for name in ("reference is target", "decoration"):
        case = next(c for c in study.CASES if c.name == name)
        rows, record = study.trained(case, 1, tmp_path / name.replace(" ", "_"), "optim.steps=5", "optim.batch_size=4")
        assert rows
        found[name] = record
    assert found["reference is target"]["found"] == found["reference is target"]["expected"] == "reference_is_target"
    assert found["decoration"]["found"] != "reference_is_target"
    assert found["reference is target"]["likeness"] > 0.9 > abs(found["decoration"]["likeness"])


@pytest.mark.slow
@pytest.mark.usefixtures("_few_people")
def test_what_an_adapter_gained_is_what_the_models_differ_by(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = study.settings
    few = ("optim.steps=3", "optim.batch_size=4", "optim.warmup=0", "eval.sigmas=[0.3,0.9]")
    monkeypatch.setattr(study, "LEVELS", (0.3, 0.9))
    monkeypatch.setattr(study, "settings", lambda *given: plain(*given, *few))
    untrained, trained = study.on_a_base(tmp_path, 1)
    assert untrained["gained"]["mean"] == 0
    assert trained["gained"]["mean"] != 0
    for record in (untrained, trained):
        base, merged = (gap["mean"] for gap in record["alone"])
        assert merged - base == pytest.approx(record["gained"]["mean"], abs=1e-4)
        assert base == pytest.approx(record["base_gap"]["mean"], abs=1e-4)
    assert untrained["swap"]["gained"] == {"mean": 0, "low": 0, "high": 0}
    assert trained["swap"]["gained"]["mean"] != 0


def test_the_page_shows_the_committed_results(study: ModuleType, tmp_path: Path) -> None:
    made = json.loads((STUDY / "results.json").read_text())
    copy = tmp_path / "study.md"
    shutil.copy(REPOSITORY / "docs/study.md", copy)
    study.study_page.page(made["results"], made["seconds"], copy)
    assert copy.read_text() == (REPOSITORY / "docs/study.md").read_text()


def test_every_verdict_of_the_committed_results_is_right(study: ModuleType) -> None:
    results = json.loads((STUDY / "results.json").read_text())["results"]
    plain = [r for r in results if "change_of_gap" not in r]
    cases = [*(c.name for c in study.CASES), study.UNTRAINED, study.TRAINED]
    assert {(r["case"], r["seed"]) for r in plain} == {(name, seed) for name in cases for seed in study.SEEDS}
    assert [r for r in plain if not study.is_right(r)] == []
