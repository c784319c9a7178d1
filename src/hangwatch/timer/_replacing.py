"""A block in another one of the same scope: the inner one's timer replaces the outer one's.

The contract knows one timer for a worker and a scope, so these pairs keep to that. Everywhere
else blocks of one scope are independent of each other.
"""

from __future__ import annotations

from hangwatch.page import layout
from hangwatch.timer._acquired import Holder, holder
from hangwatch.worker.blocks import SlotTimer

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.core import Expiration
    from hangwatch.worker.own_page import OwnPage

Open = dict[tuple[Holder, str], list["ReplacingBlock"]]
"""By thread or task, and by scope: the open blocks, outermost first."""


class ReplacingBlock(SlotTimer):
    """A block that is armed, and replaces the timer of the one around it; see `blocks.Other`.

    Args:
        open_blocks: those of one client.
        page: where the block's slot is.
        block: the block, armed.
        name: its scope.
    """

    def __init__(self, open_blocks: Open, page: OwnPage, block: Expiration, name: str) -> None:
        assert block.place is not None
        super().__init__(page, *block.place[1:])
        self._interval: float | None = None
        self._open = open_blocks
        self._key = holder(), name
        around = open_blocks.setdefault(self._key, [])
        if around:
            around[-1].suspend()
        around.append(self)

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Give the outer block its own time anew."""
        around = self._open.get(self._key, [])
        if self in around:
            was_innermost = around[-1] is self
            around.remove(self)
            if not around:
                self._open.pop(self._key, None)
            elif was_innermost:
                around[-1].resume()

    def suspend(self) -> None:
        """Let it go on without a deadline, unless it was cancelled, and stays so."""
        armed = self.armed()
        if armed is not None and armed.deadline < layout.NEVER:
            self._interval = self.page.view.interval(armed)
            self.begin_interval(layout.NEVER, self._interval)

    def resume(self) -> None:
        """Give it its own time anew, if it was suspended."""
        interval, self._interval = self._interval, None
        if interval is not None:
            self.renew(interval)
