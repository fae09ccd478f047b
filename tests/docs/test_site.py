"""The site of all documents: no warning, a search, and a link that leads nowhere ends the build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.docs.test_documents import PAGES

RECIPE = ("-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c")


def built(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, *RECIPE, "docs/site", "-d", str(out / "doctrees"), ".", str(out / "site")]
    return subprocess.run(call, cwd=source, capture_output=True, text=True, timeout=300, check=False)


def test_the_site_has_every_document_and_a_search(tmp_path: Path) -> None:
    run = built(REPOSITORY, tmp_path)
    assert run.returncode == 0, run.stderr
    for page in PAGES:
        assert (tmp_path / "site" / page.relative_to(REPOSITORY).with_suffix(".html")).is_file(), page
    assert "url=docs/site/index.html" in (tmp_path / "site" / "index.html").read_text()
    index = (tmp_path / "site" / "searchindex.js").read_text()
    assert all(f"docs/{name}" in index for name in ("settings", "glossary", "character"))
    first = (tmp_path / "site" / "docs" / "site" / "index.html").read_text()
    assert all(text in first for text in ("A character", "Glossary", "Settings", "search.html"))
    assert "http://" not in first.partition("<body")[0], "nothing is loaded from elsewhere"


def test_the_make_target_builds_the_same() -> None:
    line = next(line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "-m sphinx" in line)
    assert " ".join((*RECIPE, "docs/site")) in line


@pytest.mark.parametrize("link", ["absent.md", "other.md#no-such-heading", "missing.png)![](missing.png"])
def test_a_link_that_leads_nowhere_ends_the_build(link: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "docs/site").mkdir(parents=True)
    shutil.copy(REPOSITORY / "docs/site/conf.py", source / "docs/site")
    (source / "docs/site/index.md").write_text("# t\n\n```{toctree}\n../page\n../other\n```\n")
    (source / "docs/page.md").write_text("# page\n\n[good](other.md#a-heading)\n")
    (source / "docs/other.md").write_text("# other\n\n## A heading\n")
    assert built(source, tmp_path / "a").returncode == 0
    (source / "docs/page.md").write_text(f"# page\n\n[bad]({link})\n")
    assert built(source, tmp_path / "b").returncode == 1
