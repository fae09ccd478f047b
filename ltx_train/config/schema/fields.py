"""How a setting is declared: its default, one line of help, and its limits or choices, all in one place.

The rules, `--help`, docs/settings.md and shell completion read these declarations.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

KEY = "setting"
# OmegaConf's mark of a setting without a default, spelled out: this module imports no library.
MISSING: Any = "???"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a field says about its setting.

    least, most: inclusive bounds; below: an exclusive upper bound. choices: the allowed words, None for `null`.
    """

    help: str
    least: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str | None, ...] = ()


def setting(
    default: Any, text: str, *, least: float | None = None, most: float | None = None, below: float | None = None,
    choices: Iterable[str | None] = (),
) -> Any:  # fmt: skip
    """A dataclass field with its declaration. A default that is a list or a dict is copied for each instance."""
    declared = Declaration(help=text, least=least, most=most, below=below, choices=tuple(choices))
    metadata = {KEY: declared}
    if isinstance(default, (list, dict)):
        shared: Any = default
        return field(default_factory=lambda: deepcopy(shared), metadata=metadata)
    return field(default=default, metadata=metadata)
