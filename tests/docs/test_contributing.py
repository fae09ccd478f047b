"""The recipes of CONTRIBUTING.md: each applies to this state of the project, and its check passes."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY, command

# The largest number of files that a recipe may change; others are free.
_LIMITS = {"Add an optimizer": 2, "Add a strategy": 4}


class Recipe(NamedTuple):
    title: str
    diff: str
    check: str
    expected: str


_SECTION = re.compile(
    r"^### (?P<title>.+?)\n.*?```diff\n(?P<diff>.*?)```"
    r".*?contains `(?P<expected>[^`]+)`.*?```bash\n(?P<check>.*?)\n```",
    re.MULTILINE | re.DOTALL,
)
RECIPES = [
    Recipe(title=m["title"], diff=m["diff"], check=m["check"], expected=m["expected"])
    for m in _SECTION.finditer((REPOSITORY / "CONTRIBUTING.md").read_text())
]


def test_every_recipe_is_found() -> None:
    assert {r.title for r in RECIPES} == {
        "Add a mode", "Add a noise distribution", "Add a condition", "Add a logger", *_LIMITS,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.title.rpartition(" ")[2])
def test_a_recipe_works(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = set(re.findall(r"^\+\+\+ b/(.+)$", recipe.diff, re.MULTILINE))
    assert 0 < len(files) <= _LIMITS.get(recipe.title, 4)
    for folder in ("ltx_train", "conf", "data/sample"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    assert recipe.expected not in _output_before(recipe, capsys)
    subprocess.run(["git", "apply", "-"], input=recipe.diff, cwd=tmp_path, text=True, check=True)
    done = _check(recipe, tmp_path)
    assert recipe.expected in done.stdout, done.stderr


def _output_before(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> str:
    """What the check prints without the recipe: in this process, which has this project imported. It may fail."""
    program, *words = shlex.split(recipe.check)
    if program == "python":
        with contextlib.suppress(Exception):
            exec(words[1], {})
    else:
        command(*words)
    return capsys.readouterr().out


def _check(recipe: Recipe, folder: Path) -> subprocess.CompletedProcess[str]:
    """The check with the project in `folder`: both ways of calling Python put the current folder first."""
    program, *words = shlex.split(recipe.check)
    arguments = words if program == "python" else ["-m", "ltx_train", *words]
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
