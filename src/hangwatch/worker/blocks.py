"""Blocks that are more than one slot: what stands in a slot's place, and who gives it out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable

from hangwatch import page
from hangwatch.worker.slots import VOID_SLOT, Scope, Slot

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Protocol

    class ContractClient(Protocol):
        """The two methods that every timer client has."""

        def acquire(self, scope_id: str, expiration_time: float) -> None:
            """Acquire a timer that expires at an epoch time in seconds."""

        def release(self, scope_id: str) -> None:
            """Release it."""

    class Block(Protocol):
        """In the place of a slot: a block with a way of its own to begin and to end."""

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


class ContractBlock:
    """A block whose client is called as the contract says, once a block."""

    thread = NoThread

    def __init__(self, client: ContractClient, scope: str, limit: float) -> None:
        self.client = client
        self.scope = scope
        self.limit = limit

    def nest(self, block: object) -> Slot:
        """Acquire; the slot that is armed then is nobody's."""
        try:
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


class ReplacingBlock:
    """A block in another of the same scope and thread, whose timer it replaces while it lasts.

    Args:
        outer: the slot of the block around it, armed.
        inner: its own slot, claimed.
    """

    thread = NoThread

    def __init__(self, outer: Slot, inner: Slot) -> None:
        self._outer = outer
        self._outer_entry = outer.words[outer.entry_at]
        self._inner = inner

    def nest(self, block: object) -> Slot:
        """Arm the inner slot instead of the outer one."""
        outer = self._outer
        self._inner.block = None
        try:
            self._inner.nest(block).arm()
            # Not disarmed: a block in a block that has ended counts as ended, too.
            outer.words[outer.deadline_at] = page.REPLACED
        except BaseException:
            self.exit(None, None, None)
            raise
        return VOID_SLOT

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Give the outer block its own time anew."""
        try:
            self._end()
        except BaseException:  # an interruption: neither may stay as it is
            self._end()
            raise

    def _end(self) -> None:
        self._inner.exit(None, None, None)
        if self._outer.is_open(self._outer_entry):
            self._outer.restart()
