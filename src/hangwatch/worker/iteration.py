"""`hangwatch.watch`: a timer around each step of an iteration, none around the loop's body."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import TypeVar

    from hangwatch.worker.core import Expiration

    Item = TypeVar("Item")
else:
    Item = object


class Watched(Iterable[Item], AsyncIterable[Item]):
    """An iterable whose every step is a block.

    Args:
        iterable: what is iterated over.
        block: returns a new block.

    Raises:
        TypeError: `iterable` is none: the caller's fault.
    """

    def __init__(
        self, iterable: Iterable[Item] | AsyncIterable[Item], block: Callable[[], Expiration]
    ) -> None:
        if not hasattr(iterable, "__aiter__") and not hasattr(iterable, "__iter__"):
            # The old way to be iterable: __getitem__ alone.
            iter(iterable)
        self._iterable = iterable
        self._block = block

    def __iter__(self) -> Iterator[Item]:
        return _Steps(iter(self._iterable), self._block)  # type: ignore[arg-type]

    def __aiter__(self) -> AsyncIterator[Item]:
        return _AsyncSteps(aiter(self._iterable), self._block)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        try:
            return len(self) > 0
        except TypeError:
            return True

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


class _Steps(Iterator[Item]):
    def __init__(self, iterator: Iterator[Item], block: Callable[[], Expiration]) -> None:
        self._iterator = iterator
        self._block = block

    def __next__(self) -> Item:
        with self._block():
            return next(self._iterator)


class _AsyncSteps(AsyncIterator[Item]):
    def __init__(self, iterator: AsyncIterator[Item], block: Callable[[], Expiration]) -> None:
        self._iterator = iterator
        self._block = block

    async def __anext__(self) -> Item:
        with self._block():
            return await anext(self._iterator)
