"""Settings of Sphinx for `make site`: all documents as one searchable site, from the files where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ltx_train import __version__

project, author, release = "ltx-train", "the ltx-train authors", __version__
extensions = ["myst_parser"]
root_doc = "docs/site/index"
include_patterns = ["*.md", "data/*.md", "docs/*.md", "docs/architecture/*.md", "docs/site/*.md"]
exclude_patterns = [".*", "runs", "dist", "build", "**/node_modules"]
# Anchors as on the pages of the repository; a link to a heading that is not there is a warning, and so an error.
myst_heading_anchors = 4
myst_enable_extensions: list[str] = []
html_theme = "furo"
html_title = f"ltx-train {__version__}"
html_copy_source = False
html_show_sphinx = False


def setup(app: Any) -> None:
    app.connect("build-finished", _first_page)


def _first_page(app: Any, error: Exception | None) -> None:
    """The site's own address leads to the first document."""
    if error is None:
        page = (
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/site/index.html"><title>ltx-train</title>'
        )
        (Path(app.outdir) / "index.html").write_text(page)
