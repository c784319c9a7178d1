"""What times a block: a slot of a page, and more or something else in its place."""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf
from time import monotonic

from hangwatch.errors import UnsupportedError
from hangwatch.page import layout
from hangwatch.worker.warnings import warn

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Protocol

    from hangwatch.page.view import Armed
    from hangwatch.worker.arguments import Asked
    from hangwatch.worker.core import Expiration
    from hangwatch.worker.own_page import OwnPage

    class ContractClient(Protocol):
        """The two methods that every timer client has."""

        def acquire(self, scope_id: str, expiration_time: float) -> None:
            """Acquire a timer that expires at an epoch time in seconds."""

        def release(self, scope_id: str) -> None:
            """Release it."""

    class Timer(Protocol):
        """What is done with an open block's timer."""

        def renew(self, limit: float | None) -> None:
            """Give the block another interval, by default of its own limit."""

        def cancel(self) -> None:
            """Let the block go on without a deadline."""

        def remaining(self) -> float:
            """Return the seconds that are left; infinite without a deadline."""

    class Other(Timer, Protocol):
        """A timer that ends more than a slot, if it has one.

        It must not hold the block, which may end by being forgotten.
        """

        def exit(self, kind: object, error: object, traceback: object) -> None:
            """End; the slot is disarmed after that, whatever this raises."""

    class Transport(Protocol):
        """What arms a client's blocks."""

        def begin(self, block: Expiration, asked: Asked) -> Other | None:
            """Arm a block's timer; if that raises, it isn't armed."""


class SlotTimer:
    """The timer of a block that is armed in a slot of a page; see `Timer`.

    Args:
        page: where the slot is.
        index: the slot.
        entry: as what the block has armed it.
    """

    def __init__(self, page: OwnPage, index: int, entry: float) -> None:
        self.page = page
        self.index = index
        self.entry = entry

    def armed(self) -> Armed | None:
        """Return what the page says of the block now; None: it has ended."""
        return self.page.view.open_block(self.index, self.entry)

    def renew(self, limit: float | None) -> None:
        """Give the block another interval, by default of its own limit."""
        limit = self.page.view.limit(self.index) if limit is None else limit
        if self.begin_interval(monotonic() + limit, limit):
            self.page.ring()

    def cancel(self) -> None:
        """Let the block go on without a deadline."""
        self.begin_interval(layout.NEVER, self.page.view.limit(self.index))

    def remaining(self) -> float:
        """Return the seconds that are left."""
        page, armed = self.page, self.armed()
        # It was inherited by a fork, or the interpreter ends; or it was cancelled.
        if armed is None or armed.deadline >= layout.NEVER:
            return inf
        now, since = monotonic(), page.pauses.since()
        if since < now and not page.view.is_pause(self.index):
            now = max(since, armed.deadline - page.view.interval(armed))
        return armed.deadline - now

    def begin_interval(self, deadline: float, limit: float) -> bool:
        """Move the deadline, `limit` seconds from now, or never; False: the block has ended."""
        armed = self.armed()
        if armed is None:
            return False
        words, at, entry = self.page.words, layout.deadline_word(self.index), self.entry
        entered = self.page.view.entered(armed)
        # No calls: by another thread's hand, the block may end, or be renewed, meanwhile.
        if words[at] == 0.0 or words[at + layout.ENTRY] != entry:
            return False
        words[at + layout.ENTERED] = entered
        words[at + layout.RENEWED_ENTRY] = entry
        words[at + layout.RENEWED_LIMIT] = limit
        words[at + layout.RAISED_ENTRY] = 0.0
        words[at + layout.SKIPPED_ENTRY] = 0.0
        words[at] = deadline
        return True


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
