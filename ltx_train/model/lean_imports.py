"""Imports peft and diffusers without bitsandbytes.

Both import it for quantized layers of their own, which nothing here uses and which cost every process a second.
Optimizers with 8-bit moments import it when a run has one (`updates.optimizers`).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast

_LEFT_OUT, _IMPORTERS = "bitsandbytes", ("peft", "diffusers")


def import_libraries() -> None:
    """To be called before any other module imports them; otherwise it does nothing."""
    modules = cast("dict[str, Any]", sys.modules)
    # Either may have been imported before and have found bitsandbytes: it must not disappear then.
    if any(name in modules for name in (_LEFT_OUT, *_IMPORTERS)):
        return
    # The import system takes a module that is None for one that is not installed.
    modules[_LEFT_OUT] = None
    try:
        for name in ("peft", "diffusers.models.transformers.transformer_ltx2"):
            importlib.import_module(name)
    finally:
        del modules[_LEFT_OUT]
