"""The look that the pages of a run and of a search share, and how figures lie in them.

Owns the frame and the style: any width from a phone's on, light and dark, and print. Pages need no network.
"""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Equal figures give equal files.
matplotlib.rcParams["svg.hashsalt"] = "ltx-train"


def page(title: str, body: str) -> str:
    """A whole page. title: as a user wrote it; body: HTML."""
    head, foot = _PAGE.split("BODY")
    return head.replace("TITLE", html.escape(title)) + body + foot


def picture(figure: Any, description: str = "") -> str:
    """A figure as an inline vector image, closed afterwards."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    data, caption = base64.b64encode(buffer.getvalue()).decode(), html.escape(description)
    shown = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}">{shown}</figure>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --card: #f3f6f7; --mark: #1f6f8b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a5a5a5; --line: #444; --card: #22282b; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h3 { font-size: 1rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; } td { overflow-wrap: anywhere; } pre { overflow-x: auto; }
.best { background: var(--card); }
img { max-width: 100%; background: #fff; border-radius: 4px; } figure { margin: 0.5rem 0; }
figcaption { font-size: 0.8rem; color: var(--soft); }
.clips { display: flex; flex-wrap: wrap; gap: 1rem; } .clips figure { width: min(16rem, 100%); }
video { width: 100%; background: var(--card); border-radius: 4px; }
.verdict { background: var(--card); padding: 0.5rem 0.8rem; border-left: 4px solid var(--mark); }
@media print { body { max-width: none; margin: 0; } video { display: none; } h2, figure { break-inside: avoid; } }
</style></head><body><h1>TITLE</h1>
BODY
</body></html>
"""
