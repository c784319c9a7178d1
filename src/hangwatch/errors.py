"""The errors of hangwatch: one base, a handful of leaves.

Each message ends with what to do next. All of them pickle, so that they can
cross a process pool.
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "HangwatchError",
    "LaunchError",
    "NotConfiguredError",
    "PageError",
    "ProtocolError",
    "TimerExpired",
    "UnsupportedError",
    "VersionError",
    "WatcherUnavailableError",
]


class HangwatchError(Exception):
    """Base of every error that hangwatch raises on its own account."""


class NotConfiguredError(HangwatchError, RuntimeError):
    """A block was entered, and nobody said who watches it: the caller's fault."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "no watcher is configured: start the program with 'hangwatch run -- COMMAND', "
            "or wrap its main part in 'with hangwatch.serve():', "
            "or set HANGWATCH_ADDRESS=off to run it unwatched"
        )


class UnsupportedError(HangwatchError, ValueError):
    """What was asked of a timer can't be had there: the caller's fault."""


class AddressError(HangwatchError, ValueError):
    """An address can't be used as given: the fault of whoever set it."""


class WatcherUnavailableError(HangwatchError, ConnectionError):
    """Nobody answers at the address, or whoever does may not be trusted."""


class ProtocolError(HangwatchError):
    """The other side speaks another version, or none, of the protocol."""


class VersionError(ProtocolError):
    """The two sides are of different versions: the fault of whoever installed them.

    Attributes:
        theirs: the version of the protocol that the other side speaks, as it says so.
        ours: the one that this side speaks.
    """

    def __init__(self, message: str, theirs: str = "", ours: int = 0) -> None:
        super().__init__(message, theirs, ours)
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        return str(self.args[0])


class PageError(HangwatchError):
    """A worker's page is not one that a watcher can map safely."""


class LaunchError(HangwatchError):
    """The watcher process could not be started."""


class TimerExpired(BaseException):  # what has expired is no error of the code
    """Raised inside of a block that overran, if its ``on_expiry`` is ``"raise"``.

    Like KeyboardInterrupt no `Exception`, so that ``except Exception`` doesn't swallow it.

    Args:
        scope: the block's name.
        limit: how long it might take, in seconds.
        inside: how long it has taken, in seconds.
    """

    def __init__(self, scope: str, limit: float, inside: float) -> None:
        super().__init__(scope, limit, inside)
        self.scope = scope
        self.limit = limit
        self.inside = inside

    def __str__(self) -> str:
        return f"{self.scope!r} has taken {self.inside:.3f} s, its limit is {self.limit:g} s"
