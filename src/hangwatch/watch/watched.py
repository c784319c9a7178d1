"""One connected worker, as the watcher holds it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from hangwatch.watch.identity import Identity
from hangwatch.watch.page_reader import Armed, PageReader
from hangwatch.wire import Hello

# Visits a second that one page may ask for; who rings more often is served more slowly.
VISITS_A_SECOND = 500


@dataclass(eq=False, slots=True)
class Watched:
    """A worker and everything that the watcher holds of it.

    Attributes:
        connection: its socket; end of file ends the watch.
        identity: who the kernel says it is.
        hello: what it says of itself.
        reader: its page.
        stacks_inode: device and inode of its stack channel.
        entries: the entry counters at the last visit.
        judged: (slot, entry) pairs that an incident has dealt with.
        busy: whether an incident is under way; one at a time a worker.
    """

    connection: socket.socket
    identity: Identity
    hello: Hello
    reader: PageReader
    stacks_inode: tuple[int, int]
    entries: list[float] = field(default_factory=list)
    judged: set[tuple[int, float]] = field(default_factory=set)
    busy: bool = False
    left: bool = False
    next_visit: float = 0.0
    muted: bool = False
    _second: float = 0.0
    _visits: int = 0

    def is_ours(self, native_id: int) -> bool | None:
        """Tell whether the process still is the program that sent its page; None: unknown."""
        return self.identity.holds(self.hello.page_fd, self.reader.inode, native_id)

    def forget_ended(self) -> None:
        """Forget the judged blocks that have ended."""
        self.judged &= {(slot.index, slot.entry) for slot in self.reader.armed()}

    def may_visit(self, now: float) -> bool:
        """Count a visit; False if this page has used up its visits of this second."""
        if now - self._second >= 1.0:
            self._second, self._visits = now, 0
        self._visits += 1
        return self._visits <= VISITS_A_SECOND

    def budget_again(self) -> float:
        """Return when this page may be visited again after its budget ran out."""
        return self._second + 1.0

    def is_overdue(self, slot: Armed) -> bool:
        """Look whether the block of a verdict has still not ended."""
        return self.reader.is_still(slot)

    def close(self) -> None:
        """Let go of everything."""
        self.connection.close()
        self.reader.close()
        os.close(self.identity.pidfd)
