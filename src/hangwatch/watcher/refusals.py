"""The log of refused connections: a thousand workers of another version fill no log."""

from __future__ import annotations

import logging

EVERY = 60.0
"""Seconds in which a reason is logged once, and how often it came up once more."""
_MOST_REASONS = 100

_log = logging.getLogger("hangwatch.watcher")


class Refusals:
    """Logs each reason when it comes up, and then a count, for as long as it does."""

    def __init__(self) -> None:
        # Of each reason: until when it is only counted, and how often it was.
        self._counted: dict[str, tuple[float, int]] = {}

    def note(self, pid: int, reason: str, now: float) -> None:
        """Note a refusal.

        Args:
            pid: the process that connected.
            reason: why it was refused; a peer may have chosen some of the words.
            now: CLOCK_MONOTONIC in seconds.
        """
        if reason in self._counted:
            until, count = self._counted[reason]
            self._counted[reason] = until, count + 1
            return
        _log.warning("refused process %d: %s", pid, reason)
        if len(self._counted) < _MOST_REASONS:
            self._counted[reason] = now + EVERY, 0

    def tick(self, now: float) -> None:
        """Log what was only counted, where its time is over by `now`."""
        for reason, (until, count) in list(self._counted.items()):
            if until > now:
                continue
            del self._counted[reason]
            if count:
                _log.warning("refused %d times more: %s", count, reason)
                self._counted[reason] = now + EVERY, 0
