"""One connected worker, as the watcher holds it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

from hangwatch.process import Identity
from hangwatch.watcher.descendants import Sentence
from hangwatch.watcher.page_reader import Overdue, PageReader, Standstill
from hangwatch.wire import Hello


@dataclass(slots=True)
class Budget:
    """How much of the watcher's time one page may take; who asks for more is served later.

    Attributes:
        credit: seconds of CPU that may be spent now.
    """

    credit: float = 0.05
    _filled_at: float = 0.0

    SHARE: ClassVar[float] = 0.1
    MOST: ClassVar[float] = 0.05

    def allows(self, now: float) -> bool:
        """Tell whether a visit may be made at `now` (CLOCK_MONOTONIC)."""
        self.credit = min(self.MOST, self.credit + (now - self._filled_at) * self.SHARE)
        self._filled_at = now
        return self.credit > 0

    def spend(self, seconds: float) -> None:
        """Take what a visit cost."""
        self.credit -= seconds

    def again_after(self) -> float:
        """Return in how many seconds there is credit again."""
        return 0.001 - self.credit / self.SHARE


@dataclass(eq=False, slots=True)
class Watched:
    """A worker and everything that the watcher holds of it.

    Attributes:
        connection: its socket; end of file ends the watch.
        identity: who the kernel says it is.
        hello: what it says of itself.
        reader: its page.
        stacks_inode: device and inode of its stack channel.
        number: what the keeper knows it by.
        welcomed: whether its hello has been answered.
        entries: the entry counters at the last visit.
        judged: what an incident has dealt with, and when that is judged again, which is never
            but under a debugger. A block that moved its deadline since is judged anew.
        standing_since: since when it has stood still outside of every block (CLOCK_MONOTONIC);
            infinite while it doesn't.
        sentence: what the last step to end it was about to do, until it is dead or has survived.
        at_issue: what an incident is under way about; one at a time a worker.
        left: whether the watch has ended; an incident may still hold it.
        muted: whether its rings are not heard, its budget being used up.
        budget: how much of the watcher's time it may take.
    """

    connection: socket.socket
    identity: Identity
    hello: Hello
    reader: PageReader
    stacks_inode: tuple[int, int]
    number: int = 0
    welcomed: bool = False
    entries: list[float] = field(default_factory=list)
    judged: dict[Overdue, float] = field(default_factory=dict)
    standing_since: float = inf
    sentence: Sentence | None = None
    at_issue: Overdue | None = None
    left: bool = False
    muted: bool = False
    budget: Budget = field(default_factory=Budget)

    @property
    def busy(self) -> bool:
        """Whether an incident is under way."""
        return self.at_issue is not None

    def thread_id(self, native_id: int) -> int:
        """Return the kernel's id of one of its threads, as it is known out here.

        In a pid namespace of its own, the worker knows its threads by other numbers; of these,
        only the main thread's can be told.
        """
        return self.identity.pid if native_id == self.hello.pid else native_id

    def is_ours(self, native_id: int) -> bool | None:
        """Tell whether the process still is the program that sent its page; None: unknown."""
        return self.identity.holds(self.hello.page_fd, self.reader.inode, native_id)

    def judge_again(self, found: Overdue, when: float) -> None:
        """Let what has been judged be judged once more (CLOCK_MONOTONIC)."""
        self.judged[found] = when

    def stands_still(self, now: float, moved: bool, inside: bool, gap: float) -> Standstill | None:
        """Notice how long it has been outside of every block; return that if it is too long.

        Args:
            now: CLOCK_MONOTONIC in seconds.
            moved: whether it has entered a block since the last look.
            inside: whether it is in one.
            gap: seconds that it may stay outside.
        """
        if inside:
            self.standing_since = inf
        elif moved or self.standing_since == inf:
            self.standing_since = now
        if now - self.standing_since < gap:
            return None
        return Standstill(self.standing_since, self.standing_since + gap, tuple(self.entries))

    def forget_ended(self) -> None:
        """Forget the judged blocks that have ended."""
        self.judged = {
            found: when for found, when in self.judged.items() if self.reader.lasts(found)
        }

    def close(self) -> None:
        """Let go of everything."""
        self.connection.close()
        self.reader.close()
        os.close(self.identity.pidfd)
