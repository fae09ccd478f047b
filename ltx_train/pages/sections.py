"""What a page is made of, as templates read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """head: names of the columns. rows: cells, the first of a row its name. marked: number of the row that stands out,
    from 0 on. title: above the table."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under its own heading."""

    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    figures: Sequence[Markup] = ()


@dataclass(frozen=True, slots=True)
class Player:
    """A clip with its URLs; poster is empty where there is none."""

    caption: str
    video: str
    poster: str


@dataclass(frozen=True, slots=True)
class Group:
    """Clips side by side."""

    title: str
    clips: Sequence[Player]
