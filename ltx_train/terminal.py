"""The progress of long work on a terminal: one display a process, with a line for each work that goes on.

Owns that display. Elsewhere than on a terminal nothing is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class Display:
    """The display while it is shown; `add` and what it returns may be used in it."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            _Left(), TextColumn("{task.fields[note]}"), console=Console(stderr=True),
        )  # fmt: skip

    def add(self, what: str, total: int, done: int = 0) -> TaskID:
        return self.bars.add_task(what, total=total, completed=done, rate="", note="")


# The display that is there, at most one; and whether this process shows any.
_shown: list[Display] = []
_silenced: list[bool] = []


def silence() -> None:
    """For processes beside the one that shows the progress of all."""
    _silenced.append(True)


@contextmanager
def shown() -> Generator[Display | None]:
    """The display of this process: the one that is there, or a new one for the context. None without a terminal."""
    if _silenced or not sys.stderr.isatty():
        yield None
    elif _shown:
        yield _shown[0]
    else:
        display = Display()
        _shown.append(display)
        display.bars.start()
        try:
            yield display
        finally:
            display.bars.stop()
            _shown.clear()


@contextmanager
def counted(what: str, total: int) -> Generator[Callable[[], None]]:
    """A line that counts to `total`; call what it yields after each unit of work. The line goes with the context."""
    with shown() as display:
        if display is None:
            yield _ignored
            return
        task = display.add(what, total)
        try:
            yield lambda: display.bars.advance(task)
        finally:
            display.bars.remove_task(task)


def each(what: str, items: Sequence[T]) -> Iterator[T]:
    """The items, counted on a line of their own."""
    with counted(what, len(items)) as advance:
        for item in items:
            yield item
            advance()


def _ignored() -> None:
    pass


class _Left(TimeRemainingColumn):
    """The remaining time, named so."""

    def render(self, task: Task) -> Text:
        return super().render(task) + Text(" left")
