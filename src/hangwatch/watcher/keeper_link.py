"""The watcher's line to its keeper: a queue towards it, never a blocking send."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from time import monotonic

from hangwatch import handover
from hangwatch.handover import Kind
from hangwatch.watcher.loop import READABLE, WRITABLE, Loop

PING_EVERY = 0.2


class KeeperLink:
    """The line to the keeper.

    Args:
        connection: our end of it.
        loop: what waits for it.
        on_stop: called when the keeper wants us to end.
        on_gone: called when the keeper has died.

    Attributes:
        alive: whether the keeper is.
        on_answer: called with the number of a worker that was offered to `keep`, and
            None if the keeper has it now, else the reason why it hasn't.
    """

    def __init__(
        self,
        connection: socket.socket,
        loop: Loop,
        on_stop: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.alive = True
        self.on_answer: Callable[[int, str | None], None] = lambda number, reason: None
        self._connection = connection
        self._loop = loop
        self._on_stop = on_stop
        self._on_gone = on_gone
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._next_ping = 0.0
        loop.add(connection.fileno(), self._hear)

    def ready(self, workers: int) -> None:
        """Say that every worker is watched."""
        self._tell(Kind.READY, workers)

    def ping(self, workers: int) -> None:
        """Say that we run, if it is time to say so again."""
        now = monotonic()
        if now >= self._next_ping:
            self._next_ping = now + PING_EVERY
            # What waits in the queue says it as well.
            if self._queue:
                self._flush()
            else:
                self._tell(Kind.PING, workers)

    def keep(self, number: int, state: bytes, descriptors: list[int]) -> None:
        """Hand a worker over; `on_answer` tells how it went.

        Args:
            number: what the keeper shall know it by.
            state: see `takeover.state_of`.
            descriptors: ours from now on; closed once they are sent.
        """
        self._tell(Kind.KEEP, number, state, descriptors)

    def note(self, number: int, state: bytes) -> None:
        """Replace the state that the keeper has of a worker."""
        self._tell(Kind.NOTE, number, state)

    def drop(self, number: int) -> None:
        """Have the keeper let go of a worker."""
        self._tell(Kind.DROP, number)

    def _tell(
        self, kind: Kind, number: int, content: bytes = b"", descriptors: list[int] | None = None
    ) -> None:
        self._queue.append((handover.encode(kind, number, content), descriptors or []))
        self._flush()

    def _flush(self) -> None:
        while self.alive and self._queue:
            message, descriptors = self._queue[0]
            try:
                handover.send(self._connection, message, descriptors)
            except ConnectionError:
                self._gone()
            except OSError:
                # No room, or too many descriptors under way: when there is, or at the next ping.
                self._loop.listen_for(self._connection.fileno(), READABLE | WRITABLE)
                return
            else:
                self._queue.popleft()
                handover.close_all(descriptors)
                if not self._queue:
                    self._loop.listen_for(self._connection.fileno(), READABLE)
        if not self.alive:
            # Nobody answers any more: a newcomer is watched all the same.
            while self._queue:
                message, descriptors = self._queue.popleft()
                handover.close_all(descriptors)

    def _hear(self) -> None:
        if self._queue:
            self._flush()
        while self.alive:
            try:
                message = handover.receive(self._connection)
            except BlockingIOError:
                return
            if message is None:
                self._gone()
            elif message.kind is Kind.STOP:
                self._on_stop()
            else:
                kept = message.kind is Kind.KEPT
                self.on_answer(message.number, None if kept else message.content.decode())

    def _gone(self) -> None:
        self.alive = False
        self._loop.remove(self._connection.fileno())
        self._connection.close()
        self._on_gone()
