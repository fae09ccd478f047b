"""Figures inside a page: vectors, equal for equal data."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
from markupsafe import Markup, escape
from matplotlib import pyplot

# Equal figures give equal files.
matplotlib.rcParams["svg.hashsalt"] = "ltx-train"


def picture(figure: Any, description: str) -> Markup:
    """A figure as an inline vector image with its description below, closed afterwards."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    data, caption = base64.b64encode(buffer.getvalue()).decode(), escape(description)
    image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
    return Markup(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
