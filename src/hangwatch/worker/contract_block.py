"""A block whose client is somebody's own: called as the contract says, once a block."""

from __future__ import annotations

import contextlib
import time

from hangwatch.worker.slots import VOID_SLOT, Slot

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Protocol

    class ContractClient(Protocol):
        """The two methods that every timer client has."""

        def acquire(self, scope_id: str, expiration_time: float) -> None:
            """Acquire a timer that expires at an epoch time in seconds."""

        def release(self, scope_id: str) -> None:
            """Release it."""


class NoThread:
    """In the place of a slot's thread: no block stands alone in it."""

    alone = None


class ContractBlock:
    """In the place of a slot: a block whose client is called as the contract says."""

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
