"""What begins and ends with a block besides a slot, or in its place."""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf
from time import monotonic

from hangwatch.errors import UnsupportedError
from hangwatch.worker.warnings import warn

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Protocol

    from hangwatch.worker.arguments import Asked
    from hangwatch.worker.core import Expiration

    class ContractClient(Protocol):
        """The two methods that every timer client has."""

        def acquire(self, scope_id: str, expiration_time: float) -> None:
            """Acquire a timer that expires at an epoch time in seconds."""

        def release(self, scope_id: str) -> None:
            """Release it."""

    class Other(Protocol):
        """What a block ends besides its slot, if it has one.

        It may have `renew(limit)`, `cancel()` and `remaining()`; whichever it lacks is the slot's.
        It must not hold the block, which may end by being forgotten.
        """

        def exit(self, kind: object, error: object, traceback: object) -> None:
            """End; the slot is disarmed after that, whatever this raises."""

    class Road(Protocol):
        """Where a client's blocks are armed."""

        def begin(self, block: Expiration, name: str, asked: Asked) -> Other | None:
            """Arm a block's timer; if that raises, it isn't armed."""


class ContractBlock:
    """A block whose client is called as the contract says, once a block."""

    def __init__(self, client: ContractClient, scope: str, limit: float) -> None:
        self._client = client
        self._scope = scope
        self._expires = monotonic() + limit
        try:
            client.acquire(scope, time.time() + limit)
        except Exception:
            raise
        except BaseException:
            # An interruption: the client may have acquired already.
            with suppress(Exception):
                client.release(scope)
            raise

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Release; the body's own exception always wins."""
        try:
            self._client.release(self._scope)
        except Exception as problem:
            if kind is None:
                raise
            warn(f"release({self._scope!r}) failed after the block had failed: {problem!r}")

    def renew(self, limit: float | None) -> None:
        """Refuse: a client's `acquire` is called once a block."""
        raise cannot(self._client, "renew a timer")

    def cancel(self) -> None:
        """Refuse: a client's `release` is called once a block."""
        raise cannot(self._client, "cancel a timer")

    def remaining(self) -> float:
        """Return the seconds that are left."""
        return self._expires - monotonic()


class Unwatched:
    """A block that nobody watches: there is nothing to be done."""

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Do nothing."""

    def renew(self, limit: float | None) -> None:
        """Do nothing."""

    def cancel(self) -> None:
        """Do nothing."""

    def remaining(self) -> float:
        """Return that there is no deadline."""
        return inf


UNWATCHED = Unwatched()


def no_end() -> UnsupportedError:
    """Return the error of who wants a pause to last for ever."""
    return UnsupportedError("a pause must have an end: renew it instead of cancelling it")


def cannot(client: object, what: str) -> UnsupportedError:
    """Return the error of who asks of a client what only a watcher of hangwatch's can do."""
    return UnsupportedError(
        f"{type(client).__name__} can't {what}: a client of a protocol of its own acquires and "
        "releases; for more, use hangwatch.SharedMemoryTimerClient"
    )
