"""Figures inside a page: vectors, equal for equal data.

Owns the plotting library, which is imported with the first figure. No global state: figures are drawn in any thread.
"""

from __future__ import annotations

import base64
import io
from typing import Any

from markupsafe import Markup, escape


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, several as an array. figsize: inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns)


def viridis(share: float) -> Any:
    """A colour of the scale `viridis`, share in [0, 1]."""
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def picture(figure: Any, description: str) -> Markup:
    """A figure as an inline vector image with its description below."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "ltx-train"}):  # equal figures give equal files
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    data, caption = base64.b64encode(buffer.getvalue()).decode(), escape(description)
    image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
    return Markup(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
