"""Notices that this process did not run, and so that perhaps no worker did: a frozen cgroup."""

from __future__ import annotations

from collections.abc import Callable, Generator
from math import inf
from time import monotonic

# Being this late means that we, and perhaps the workers too, did not run: a frozen
# cgroup, a stopped job. Who is overdue by then gets a moment to leave its block.
_OVERSLEPT = 1.0
_LONGEST_SETTLING = 1.0


class FairClock:
    """Knows when we should have run, and who was overdue while nobody did.

    A pause can begin anywhere, also between the end of a sleep and a decision. So whatever decides
    by the time notices first.

    Args:
        on_pause: told how long we did not run, in seconds, if that is unusual.
    """

    def __init__(self, on_pause: Callable[[float], None] = lambda late: None) -> None:
        self._on_pause = on_pause
        # Until the first sleep: what a successor finds overdue gets nothing on top.
        self._awake_by = inf
        self._paused_until = self._pause = self._lost = 0.0

    def sleeps_until(self, when: float) -> None:
        """Note when we mean to run again (CLOCK_MONOTONIC)."""
        self.notice()
        self._awake_by = when

    def notice(self) -> float:
        """Notice a pause, if there was one since we meant to run, or noticed last.

        Returns:
            The time until which every pause is known (CLOCK_MONOTONIC).
        """
        now = monotonic()
        if self._awake_by < inf:
            late, self._awake_by = now - self._awake_by, now
            if late > _OVERSLEPT:
                self._paused_until, self._pause = now, late
                self._lost += late
                self._on_pause(late)
        return now

    def settling(self, deadline: float, limit: float) -> float:
        """Return the seconds that a block which is overdue gets to end by itself.

        Args:
            deadline: when it should have ended (CLOCK_MONOTONIC).
            limit: its limit in seconds.
        """
        self.notice()
        if deadline > self._paused_until:
            return 0.0
        return min(self._pause, limit, _LONGEST_SETTLING)

    def wait(
        self, within: float, done: Callable[[], bool], look_every: float = inf
    ) -> Generator[float, None, bool]:
        """Wait until `done()`, for some seconds, not counting those in which nobody ran.

        Args:
            within: for how long, in seconds.
            done: what is waited for.
            look_every: seconds until the next look, if nothing happens before.

        Yields:
            When to look again, at the latest (CLOCK_MONOTONIC).

        Returns:
            Whether it is done.
        """
        began, lost = self.notice(), self._lost
        while not done():
            now = self.notice()
            until = began + within + self._lost - lost
            if now >= until:
                return False
            yield min(until, now + look_every)
        return True
