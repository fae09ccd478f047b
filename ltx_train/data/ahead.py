"""Fetches shards before they are needed, in the order of the coming batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

from ltx_train.contracts import UserError
from ltx_train.data.files import Files
from ltx_train.data.order import Address

# Batches that are looked ahead, and files that are fetched at once.
_BATCHES, _AT_ONCE = 64, 4


class FetchAhead:
    """Passes batches of addresses on, and has the files of the next ones fetched meanwhile.

    shards: the files that an address is read from. most: how many different files are fetched ahead; more would push
    each other out of a cache. A file that cannot be had is left to the process that reads it, which names it.
    """

    def __init__(
        self, batches: Iterable[list[Address]], files: Files, shards: Callable[[Address], Sequence[str]], *, most: int
    ) -> None:  # fmt: skip
        self._batches, self._files, self._shards, self._most = batches, files, shards, most

    def __len__(self) -> int:
        return len(self._batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[list[Address]]:
        coming = iter(self._batches)
        window: deque[tuple[list[Address], frozenset[str]]] = deque()
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        try:
            while True:
                self._look_ahead(coming, window, pool)
                if not window:
                    return
                yield window.popleft()[0]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _look_ahead(
        self, coming: Iterator[list[Address]], window: deque[tuple[list[Address], frozenset[str]]],
        pool: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        """Adds batches while their files are few enough; the next batch in any case."""
        waiting = frozenset[str]().union(*(names for _, names in window))
        while len(window) < _BATCHES and (not window or len(waiting) < self._most):
            batch = next(islice(coming, 1), None)
            if batch is None:
                return
            names = frozenset(name for address in batch for name in self._shards(address))
            for name in sorted(names - waiting):
                pool.submit(self._fetch, name)
            waiting |= names
            window.append((batch, names))

    def _fetch(self, name: str) -> None:
        with suppress(UserError, OSError):
            self._files.path(name)
