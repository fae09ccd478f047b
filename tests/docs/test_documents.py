"""What the documents promise: commands exist, settings compose, links lead somewhere."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ltx_train import __version__, config
from ltx_train.config.command_table import COMMANDS
from tests.conftest import REPOSITORY, command

PAGES = sorted([*REPOSITORY.glob("*.md"), REPOSITORY / "data" / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
# test_contributing and test_guides run the commands of these.
RUN = {"CONTRIBUTING.md", "character.md", "voice-identity.md", "talking-avatar.md"}
LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def lines(prefix: str) -> list[str]:
    """Every command line in the documents and in the Makefile's recipes that starts with `prefix`."""
    texts = [page.read_text() for page in PAGES if page.name not in RUN]
    texts += [path.read_text() for path in (REPOSITORY / "conf").glob("*/*.yaml")]
    found = [m for text in texts for m in re.findall(rf"^(?:# )?({prefix} [^\n`]*)", text, re.MULTILINE)]
    return sorted({re.sub(r"\s+#.*$", "", line) for line in found})


@pytest.mark.parametrize("line", lines("ltx-train"))
def test_documented_commands_compose(line: str) -> None:
    name, *words = [w for w in shlex.split(line)[1:] if w != "..."]
    if (name, words[:1]) == ("evaluate", ["swap"]):
        name, words = "swap", words[1:]
    assert name in (*COMMANDS, "help")
    # [key=value ...]: what may be left out. A list's own bracket stays.
    words = [w.removeprefix("[") for w in words]
    words = [w[:-1] if w.endswith("]") and w.count("]") > w.count("[") else w for w in words]
    overrides = [w for w in words if "=" in w and not w.startswith("--")]
    others = [w for w in words if "=" not in w and not w.startswith("-") and w not in ("job", "NAME")]
    assert len(others) <= 1, "a folder in place of overrides, a group, or a shell"
    if "-m" not in words:
        config.compose_config([*overrides, "data.source=x", "data.root=y"])


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^|`)make ([a-z]+)", "".join(p.read_text() for p in PAGES), re.MULTILINE)))
)
def test_documented_make_targets_exist(target: str) -> None:
    assert re.search(rf"^[a-z ]*\b{target}\b[a-z ]*:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if LINK.search(p.read_text())], ids=lambda p: str(p.relative_to(REPOSITORY))
)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("line", lines("hf download"))
def test_the_download_lines_are_ones_of_the_hubs_client(line: str, tmp_path: Path) -> None:
    """Without a network its answer is that the file is not in the cache; a wrong option would be exit code 2."""
    program = Path(sys.executable).with_name("hf")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [program, *shlex.split(line)[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "offline" in done.stderr


def test_the_tests_that_documents_name_exist() -> None:
    pages = "\n".join(page.read_text() for page in (REPOSITORY / "docs").rglob("*.md"))
    named = set(re.findall(r"(test_\w+\.py)::(\w+)", pages))
    assert len(named) > 15
    known = {
        (path.name, name)
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named <= known, named - known


def test_help_lists_every_target_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    out = subprocess.run(["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert all(f"make {t}" in out.stdout for t in ("help", "setup", "demo", "test", "lint"))
    assert command() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("experiment", ["talking_head_22b", "audio_reference"])
def test_cfg_job_answers_within_a_second(experiment: str) -> None:
    """And without torch. Seconds of the processor, best of three: other tests are running beside this one."""
    arguments = [sys.executable, "-m", "ltx_train", "fit", "--cfg", "job", f"experiment={experiment}"]
    times: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert "rank: 32" in out
    assert min(times) < 1
    code = "import sys; from ltx_train import config; config.compose_config([]); print('torch' in sys.modules)"
    probe = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert probe.stdout.strip() == "False"


def test_versions_are_pinned() -> None:
    """Every direct dependency has an exact version in the constraints."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=\[]", d)[0] for d in project["dependencies"] + project["optional-dependencies"]["dev"]]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert [n for n in names if n.lower().replace("_", "-") not in pinned] == []
    assert "torch==2.13.0" in (REPOSITORY / "constraints.txt").read_text()


def test_the_version_has_its_changes() -> None:
    assert f"## [{__version__}] - " in (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"version: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()


def test_the_workflow_runs_the_tests() -> None:
    """And every YAML file of the repository's forms can be read."""
    forms = [*(REPOSITORY / ".github").rglob("*.yaml"), REPOSITORY / ".pre-commit-config.yaml"]
    assert len(forms) > 3
    read = {form.name: yaml.safe_load(form.read_text()) for form in forms}
    assert {"run": "make test"} in read["test.yaml"]["jobs"]["test"]["steps"]


def test_the_sample_is_small() -> None:
    files = list((REPOSITORY / "data" / "sample").iterdir())
    assert sum(f.stat().st_size for f in files) < 1_000_000
    assert len(list((REPOSITORY / "data" / "sample").glob("*.mp4"))) == 80


@pytest.mark.parametrize(
    "script", [*(REPOSITORY / "launch").rglob("*.sh"), *(REPOSITORY / "docs").rglob("*.sh")], ids=lambda p: p.name
)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_measured_cases_compose() -> None:
    """Every case of docs/performance/measure.sh is a configuration."""
    text = (REPOSITORY / "docs" / "performance" / "measure.sh").read_text()
    words = dict(re.findall(r'^(A|B|RESIDENT)="(.*)"$', text, re.MULTILINE))
    cases = re.findall(r'^  \[(\w+)\]="(.*)"$', text, re.MULTILINE)
    assert len(cases) > 15
    for name, line in cases:
        filled = re.sub(r"\$(\w+)", lambda match: words[match[1]], line)
        assert config.compose_config(filled.split()).model.weights == "random", name
