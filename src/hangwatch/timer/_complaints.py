"""Warnings about what others send: one a second at most, whatever they do."""

from __future__ import annotations

from time import monotonic

_AT_MOST_EVERY = 1.0


class Complaints:
    """Logs warnings, and counts those that come too fast."""

    def __init__(self) -> None:
        self._next = 0.0
        self._unsaid = 0

    def say(self, text: str) -> None:
        """Log a warning, or count it."""
        now = monotonic()
        if now < self._next:
            self._unsaid += 1
            return
        import logging

        more = f" (and {self._unsaid} more such things before)" if self._unsaid else ""
        self._next, self._unsaid = now + _AT_MOST_EVERY, 0
        logging.getLogger("hangwatch").warning("%s%s", text, more)
