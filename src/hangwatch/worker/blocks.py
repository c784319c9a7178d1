"""Blocks that are more than one slot: what stands in a slot's place, and who gives it out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable
from math import inf
from time import monotonic

from hangwatch.errors import UnsupportedError
from hangwatch.page import layout as page
from hangwatch.worker.slots import VOID_SLOT, Scope, Slot

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Protocol

    from hangwatch.worker.pauses import Pauses

    class ContractClient(Protocol):
        """The two methods that every timer client has."""

        def acquire(self, scope_id: str, expiration_time: float) -> None:
            """Acquire a timer that expires at an epoch time in seconds."""

        def release(self, scope_id: str) -> None:
            """Release it."""

    class Timer(Protocol):
        """An open block's timer, as its holder handles it. False: the block has ended."""

        def renew(self, limit: float | None) -> bool:
            """Begin another interval now; None: of the block's own limit, in seconds."""

        def cancel(self) -> bool:
            """Let the block go on without a deadline."""

        def remaining(self) -> float | None:
            """Return the seconds that are left; infinite without a deadline."""

    class Block(Protocol):
        """In the place of a slot: a block with a way of its own to begin and to end."""

        @property
        def timer(self) -> Timer:
            """Its timer. It must not hold the block, which may end by being forgotten."""

        @property
        def thread(self) -> type[NoThread]:
            """`NoThread`: it never goes the quiet path."""

        def nest(self, block: object) -> Slot:
            """Begin; return the slot that is armed then, which may be nobody's."""

        def exit(self, kind: object, error: object, traceback: object) -> None:
            """End."""

    class Road(Protocol):
        """Where a client's blocks are armed."""

        def choose(self, key: Hashable, after: object, limit: float, scope: Scope) -> Slot | Block:
            """Claim what a block is armed in; see `PageWriter.choose`."""


class NoThread:
    """In the place of a slot's thread: no block stands alone in it."""

    alone = None


class SlotTimer:
    """The timer of the block that armed a slot as `entry`."""

    def __init__(self, slot: Slot, entry: float) -> None:
        self.slot = slot
        self.entry = entry

    def renew(self, limit: float | None) -> bool:
        """Begin another interval."""
        return self.slot.renew(self.entry, limit)

    def cancel(self) -> bool:
        """Let the block go on without a deadline."""
        return self.slot.suspend(self.entry)

    def remaining(self) -> float | None:
        """Return the seconds that are left."""
        slot, entry = self.slot, self.entry
        deadline = slot.words[slot.deadline_at]
        if not slot.is_open(entry):
            return None
        if deadline >= page.NEVER:
            return inf
        pauses = slot.thread.pauses
        since = None if pauses is None or slot.scope.pauses else pauses.stand_since()
        now = monotonic() if since is None else max(since, deadline - slot.interval(entry))
        return deadline - now


class PauseTimer(SlotTimer):
    """The timer of a pause."""

    def cancel(self) -> bool:
        """Refuse: a pause without an end would be a switch."""
        raise no_end()


class Unwatched:
    """The timer of blocks that nobody watches: there is nothing to be done."""

    def renew(self, limit: float | None) -> bool:
        """Do nothing."""
        return True

    def cancel(self) -> bool:
        """Do nothing."""
        return True

    def remaining(self) -> float | None:
        """Return that there is no deadline."""
        return inf


UNWATCHED = Unwatched()


class ContractBlock:
    """A block whose client is called as the contract says, once a block."""

    thread = NoThread

    def __init__(self, client: ContractClient, scope: str, limit: float) -> None:
        self.client = client
        self.scope = scope
        self.limit = limit
        self._expires: float | None = None

    @property
    def timer(self) -> Timer:
        """This block itself."""
        return self

    def nest(self, block: object) -> Slot:
        """Acquire; the slot that is armed then is nobody's."""
        try:
            self._expires = monotonic() + self.limit
            self.client.acquire(self.scope, time.time() + self.limit)
        except Exception:
            raise
        except BaseException:
            # An interruption: the client may have acquired already.
            with contextlib.suppress(Exception):
                self.client.release(self.scope)
            raise
        return VOID_SLOT

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Release; the body's own exception always wins."""
        self._expires = None
        try:
            self.client.release(self.scope)
        except Exception:
            if kind is None:
                raise
            import logging

            logging.getLogger("hangwatch").warning(
                "hangwatch: release(%r) failed after the block had failed",
                self.scope,
                exc_info=True,
            )

    def renew(self, limit: float | None) -> bool:
        """Refuse: a client's `acquire` is called once a block."""
        raise cannot(self.client, "renew a timer")

    def cancel(self) -> bool:
        """Refuse: a client's `release` is called once a block."""
        raise cannot(self.client, "cancel a timer")

    def remaining(self) -> float | None:
        """Return the seconds that are left."""
        return None if self._expires is None else self._expires - monotonic()


class PausingBlock:
    """A block that suspends the other timers of its page while it lasts.

    Args:
        slot: its own slot, claimed: its limit is how long the pause may be.
        pauses: those of the page.
    """

    thread = NoThread

    def __init__(self, slot: Slot, pauses: Pauses) -> None:
        self._slot = slot
        self._entry = slot.entry
        self._pauses = pauses
        # Held, so that nobody takes the slot back before we end: see `Slot.is_held`.
        self._disarm = slot.exit
        self.timer = PauseTimer(slot, slot.entry)

    def nest(self, block: object) -> Slot:
        """Begin the pause."""
        self._slot.block = None
        try:
            self._pauses.begin(self._slot.nest(block), held_by=self)
        except BaseException:
            self.exit(None, None, None)
            raise
        return VOID_SLOT

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """End the pause; the other timers go on with what was left to them."""
        try:
            self._pauses.end(self._slot, self._entry)
        except BaseException:  # an interruption: nothing may stay suspended, or lose its time
            self._pauses.end(self._slot, self._entry)
            raise


def no_end() -> UnsupportedError:
    """Return the error of who wants a pause to last for ever."""
    return UnsupportedError("a pause must have an end: renew it instead of cancelling it")


def cannot(client: object, what: str) -> UnsupportedError:
    """Return the error of who asks of a client what only a watcher of hangwatch's can do."""
    return UnsupportedError(
        f"{type(client).__name__} can't {what}: a client of a protocol of its own acquires and "
        "releases; for more, use hangwatch.SharedMemoryTimerClient"
    )
