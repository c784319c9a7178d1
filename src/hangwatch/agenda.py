"""What is due when: a heap that skips what was put off or dropped meanwhile."""

from __future__ import annotations

import heapq
from math import inf

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class Agenda:
    """Keys, each with one time; what a step costs follows what is due, not what is there.

    Source: the documentation of heapq, priority queues whose entries change.
    """

    def __init__(self) -> None:
        self._due: dict[Any, float] = {}
        self._heap: list[tuple[float, int, Any]] = []
        self._order = 0

    def put(self, key: Any, when: float) -> None:
        """Let a key be due at `when`, in place of its earlier time; infinite: never."""
        if when == inf:
            self.drop(key)
            return
        self._due[key] = when
        if len(self._heap) > 64 + 4 * len(self._due):
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._order += 1  # of keys due at one time, the first one comes first
        heapq.heappush(self._heap, (when, self._order, key))

    def drop(self, key: Any) -> None:
        """Forget a key."""
        self._due.pop(key, None)

    def next(self) -> float:
        """Return when the next key is due; infinite: none is."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def take(self, by: float) -> Iterator[tuple[Any, float]]:
        """Take the keys that are due by then, and when each was, the earliest first."""
        while self.next() <= by and self._heap:
            when, _, key = heapq.heappop(self._heap)
            del self._due[key]
            yield key, when
