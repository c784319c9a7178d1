"""A block in another one of the same scope: the inner one's timer replaces the outer one's.

The contract knows one timer for a worker and a scope, so these pairs keep to that. Everywhere
else blocks of one scope are independent of each other.
"""

from __future__ import annotations

from hangwatch.page.layout import NEVER
from hangwatch.worker.blocks import NoThread, SlotTimer
from hangwatch.worker.slots import VOID_SLOT, Slot


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
        self._outer_limit: float | None = None
        self._inner = inner
        # Held, so that nobody takes the slot back before we end: see `Slot.is_held`.
        self._disarm = inner.exit
        self.timer = SlotTimer(inner, inner.entry)

    def nest(self, block: object) -> Slot:
        """Arm the inner slot instead of the outer one."""
        outer, entry = self._outer, self._outer_entry
        self._inner.block = None
        try:
            self._inner.nest(block).arm()
            if outer.words[outer.deadline_at] < NEVER:  # else it was cancelled, and stays so
                self._outer_limit = outer.interval(entry)
                outer.suspend(entry)
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
        self._disarm(None, None, None)
        limit, self._outer_limit = self._outer_limit, None
        if limit is not None:
            self._outer.renew(self._outer_entry, limit)
