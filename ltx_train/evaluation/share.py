"""How the processes of a run share out a measurement or the generation of clips.

Owns which items a process takes and how often it must pass through the model. Knows no collectives: the caller passes
one in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Process `part` of `parts` takes the items part, part + parts, part + 2 * parts, ...

    most: the largest of a number over all processes, where they communicate within a pass and so must run equally many.
    None: each goes its own way.
    """

    part: int = 0
    parts: int = 1
    most: Callable[[int], int] | None = None

    def turns(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This process's items, each with True. Where processes pass together, those that have fewer repeat the first
        item, with False: its results are dropped."""
        own = items[self.part :: self.parts]
        yield from ((item, True) for item in own)
        if self.most is not None:
            yield from ((items[0], False) for _ in range(-(-len(items) // self.parts) - len(own)))

    def missing(self, count: int) -> int:
        """How many passes more than `count` another process runs. Collective where processes pass together."""
        return 0 if self.most is None else self.most(count) - count


ALL = Share()
