"""What the watcher was told to do about a block that overran, and what the block asks for."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import StrEnum

from hangwatch.page import layout as page

SIGNAL_GRACE = 5.0
"""Seconds between a step other than SIGKILL and the next one, if no grace was set."""


class OnExpiry(StrEnum):
    """What happens to a worker whose block overran."""

    REAP = "reap"
    """Write down why, kill it, confirm its death."""
    RAISE = "raise"
    """Write down why, raise `TimerExpired` in the block; reap it if it stays there."""
    REPORT = "report"
    """Write down why and leave it alone."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a block asks for; whatever the bytes in its page are.

    Attributes:
        on_expiry: what an overrun leads to; None: as the watcher says.
        signal: what is sent first, `page.NEVER_KILL`, or 0: as the watcher says.
        grace: seconds that each step before SIGKILL has; None: as the watcher says.
    """

    on_expiry: OnExpiry | None = None
    signal: int = 0
    grace: float | None = None


@dataclass(frozen=True, slots=True)
class Ladder:
    """The steps against one worker.

    Attributes:
        on_expiry: where it leads.
        first: the signal that is sent first.
        grace: seconds that a first signal has before SIGKILL.
        soft_grace: seconds that `TimerExpired` has before the first signal.
    """

    on_expiry: OnExpiry
    first: int
    grace: float
    soft_grace: float


@dataclass(frozen=True, slots=True)
class Settings:
    """The watcher's settings.

    Attributes:
        on_expiry: what happens to a worker whose block overran, if the block doesn't say.
        force: whether that overrides what blocks say.
        signal: what is sent first; 0: SIGTERM if there is a grace, else SIGKILL.
        grace: seconds that each step before SIGKILL has; 0: SIGKILL at once.
        tree: whether the worker's descendants are killed with it.
        gap: seconds that a worker may stay outside of every block; 0: for ever.
        stacks: whether a worker is asked for its Python stacks.
        kill_debugged: whether a worker under a debugger is treated as any other.
        report_dir: absolute path of the report folder; None keeps no reports.
        allowed_uids: the users whose processes are watched.
        spared_pid: a process that is reported on and never signalled; 0: none.
    """

    on_expiry: OnExpiry = OnExpiry.REAP
    force: bool = False
    signal: int = 0
    grace: float = 0.0
    tree: bool = True
    gap: float = 0.0
    stacks: bool = True
    kill_debugged: bool = False
    report_dir: str | None = None
    allowed_uids: frozenset[int] = frozenset()
    spared_pid: int = 0

    def other_users(self) -> list[int]:
        """Return the users besides our own whose processes are watched."""
        return sorted(self.allowed_uids - {os.geteuid()})

    def ladder(self, wishes: Wishes, pid: int) -> Ladder:
        """Decide about a block of process `pid` that overran."""
        grace = self.grace if wishes.grace is None else wishes.grace
        first = wishes.signal or self.signal or (signal.SIGTERM if grace > 0 else signal.SIGKILL)
        on_expiry = self.on_expiry
        if not self.force and wishes.on_expiry is not None:
            on_expiry = wishes.on_expiry
        if wishes.signal == page.NEVER_KILL or pid == self.spared_pid:
            on_expiry = OnExpiry.REPORT
        # Who asks for a signal and for no grace gets none; who says nothing of it, a usual one.
        signal_grace = 0.0 if wishes.grace == 0.0 else grace or SIGNAL_GRACE
        return Ladder(on_expiry, first, signal_grace, grace or SIGNAL_GRACE)
