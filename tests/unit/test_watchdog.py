"""The watchdog's limit follows the steps, and its message names what is awaited."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ltx_train.training import watchdog
from ltx_train.training.watchdog import Watchdog, step_limit


@pytest.mark.parametrize(
    ("steps", "limit"),
    [([], 900), ([1.0] * 4, 900), ([1.0] * 5, 180), ([30.0] * 9, 600), ([400.0] * 9, 2000), ([1.0] * 9 + [500.0], 180)],
    ids=["unknown", "few", "short", "longer", "longer than the setting allows", "one slow step"],
)
def test_the_limit_of_a_step_follows_the_median(steps: list[float], limit: float) -> None:
    assert step_limit(900.0, steps) == limit


def test_a_short_limit_stays() -> None:
    assert step_limit(20.0, [0.1] * 9) == 20.0


def test_a_stuck_process_names_what_its_device_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()
        dog._done.set()

    monkeypatch.setattr(watchdog.os, "_exit", end)
    dog = Watchdog(tmp_path, 3, start_s=0.1, step_s=0.1)
    dog.explain_with(lambda: "its device waits for the gradients of rank 1")
    with dog:
        assert ended.wait(60)
    assert codes[0] == 76
    printed = capsys.readouterr().err
    assert "rank 3 made no progress" in printed
    assert "; its device waits for the gradients of rank 1" in printed
    assert (tmp_path / "stacks" / "rank-3.txt").read_text()


def test_only_steps_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the work between them, nor loading."""
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(tmp_path, 0, start_s=3600, step_s=900)
    for _ in range(6):
        for seconds, patient in ((2.0, True), (100.0, False)):  # a step, then a measurement
            now[0] += seconds
            dog.beat(patient=patient)
    assert list(dog._steps) == [2.0] * 5
    assert dog._limit == 180
