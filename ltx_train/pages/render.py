"""Fills a page's template with values, which may come from anybody: captions, names of people and of files.

Owns escaping. A page is one file that needs no network.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TYPES = {".mp4": "video/mp4", ".jpg": "image/jpeg"}


def render(template: str, **values: Any) -> str:
    """The page of a template in `templates/`. Text is escaped, in HTML; control characters and those that reverse the
    direction of writing are shown as U+FFFD."""
    return _environment().get_template(template).render(**values)


def embedded(path: Path) -> Markup:
    """A file as a URL that holds its bytes. Nothing in it needs escaping, which would take seconds for large clips."""
    return Markup(f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
        autoescape=lambda name: name is None or not name.endswith(".md.j2"), finalize=_printable, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters["cell"] = _cell
    return made


def _cell(text: str) -> str:
    """Text in one cell of a Markdown table, without markup of its own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _printable(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join("\ufffd" if _hidden(c) else c for c in value)


def _hidden(character: str) -> bool:
    """Control characters but for tab and line feed, and the format characters of bidirectional text."""
    return (unicodedata.category(character) == "Cc" and character not in "\t\n") or (
        unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    )
