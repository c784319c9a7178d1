"""A block in another one of the same scope: the inner one's timer replaces the outer one's.

The contract knows one timer for a worker and a scope, so these pairs keep to that. Everywhere
else blocks of one scope are independent of each other.
"""

from __future__ import annotations

from hangwatch.page import layout
from hangwatch.worker.blocks import SlotTimer

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.page.view import Armed
    from hangwatch.worker.core import Expiration
    from hangwatch.worker.own_page import OwnPage

Replaced = dict[tuple[int, float], float]
"""By slot and entry: the seconds that a block gets when the blocks in it have ended."""


def replace_outer(replaced: Replaced, page: OwnPage, block: Expiration) -> ReplacingBlock | None:
    """Let a block's timer replace that of the block around it, if there is one of its scope.

    Args:
        replaced: the timers of this client that were replaced.
        page: where the block was just armed.
        block: the block.
    """
    if block.place is None:
        return None
    _, index, entry = block.place
    replacing = ReplacingBlock(replaced, page, index, entry)
    return replacing if replacing.replace_outer() else None


class ReplacingBlock(SlotTimer):
    """A block whose timer has replaced that of the block around it; see `blocks.Other`."""

    def __init__(self, replaced: Replaced, page: OwnPage, index: int, entry: float) -> None:
        super().__init__(page, index, entry)
        self._replaced = replaced

    def replace_outer(self) -> bool:
        """Let the outer block go on without a deadline; return whether there is one."""
        outer, view = self._outer(), self.page.view
        if outer is None:
            return False
        for place in list(self._replaced):
            if view.open_block(*place) is None:  # it ended before the block in it
                self._replaced.pop(place, None)
        if outer.deadline < layout.NEVER:  # else it was cancelled, and stays so
            interval = view.interval(outer)
            self._replaced[outer.block] = interval
            SlotTimer(self.page, *outer.block).begin_interval(layout.NEVER, interval)
        return True

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Give the outer block its own time anew."""
        outer = self._outer()
        if outer is not None and outer.block in self._replaced:
            SlotTimer(self.page, *outer.block).renew(self._replaced.pop(outer.block))

    def _outer(self) -> Armed | None:
        """Return the innermost other open block of the same scope, thread and task."""
        mine, view = self.armed(), self.page.view
        if mine is None:
            return None
        scope = view.read_details(mine.index).scope
        of_scope = [
            other
            for other in view.others_of_its_thread(mine)
            if view.read_details(other.index).scope == scope and not view.is_pause(other.index)
        ]
        return max(of_scope, key=view.entered, default=None)
