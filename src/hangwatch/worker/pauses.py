"""What suspends the timers of one page: `hangwatch.paused`.

While a block that pauses is armed, the watcher passes over all others. When the last one
ends, each other open block gets back the time that it was suspended for: its deadline is
moved first, the pause ends after that, so nobody ever sees the one without the other.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from time import monotonic

from hangwatch.page import layout
from hangwatch.worker.blocks import SlotTimer, no_end

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.page.view import View
    from hangwatch.worker.core import Expiration
    from hangwatch.worker.own_page import OwnPage


class Pauses:
    """The pauses of one page.

    Args:
        view: what the page says.
        words: the page's words, to be changed.
        ring: tells the watcher.
    """

    def __init__(self, view: View, words: memoryview[float], ring: Callable[[], bool]) -> None:
        self._view = view
        self._words = words
        self._ring = ring
        self._pid = os.getpid()
        # Reentrant: a signal handler may pause, too. Taken and given back in C, so no
        # exception can leave it held.
        self._lock = threading.RLock()
        self._since = inf
        self._pausing: list[tuple[int, float]] = []
        # Where, from, to: made once a pause, so that what was interrupted can be done again.
        self._moves: list[tuple[int, float, float]] | None = None

    def begin(
        self, page: OwnPage, block: Expiration, arm: Callable[[], bool]
    ) -> PausingBlock | None:
        """Begin a pause; if that raises, it has not begun.

        Args:
            page: the page.
            block: the block that pauses.
            arm: arms its slot; returns whether there was one left.
        """
        with self._lock:
            self._forget_ended()
            if not self._pausing:
                self._since = monotonic()
                self._moves = None
            if not arm():
                return None
            assert block.place is not None
            _, index, entry = block.place
            self._pausing.append((index, entry))
            return PausingBlock(page, index, entry)

    def end(self, index: int, entry: float) -> None:
        """End the pause that armed a slot as `entry`; a second time does nothing."""
        if os.getpid() != self._pid:
            return  # a forked child: the pause is its parent's, and so may the lock be
        with self._lock:
            if self._view.open_block(index, entry) is None:
                return
            self._forget_ended()
            if self._pausing in ([(index, entry)], []):
                if self._moves is None:
                    self._moves = list(self._moves_of(self._since, monotonic()))
                for at, before, after in self._moves:
                    # No calls: another thread may end or renew its block meanwhile.
                    if self._words[at] == before:
                        self._words[at] = after
            self._words[layout.deadline_word(index)] = 0.0
        # What was suspended may be due before the watcher looks again.
        self._ring()

    def since(self) -> float:
        """Return since when the page's timers are suspended; infinite: they run."""
        # Mostly none was ever begun, and nothing needs to be read.
        return self._since if self._pausing and self._view.is_paused() else inf

    def _forget_ended(self) -> None:
        self._pausing = [place for place in self._pausing if self._view.open_block(*place)]

    def _moves_of(self, since: float, until: float) -> Iterator[tuple[int, float, float]]:
        """Yield which words of suspended blocks must change, and how."""
        view = self._view
        for slot in view.armed():
            # What was due before has no time left that could be given back.
            if slot.deadline <= since or view.is_pause(slot.index):
                continue
            at = layout.deadline_word(slot.index)
            if view.is_renewed(slot):
                entered = view.entered(slot)
                yield at + layout.ENTERED, entered, entered + until - max(since, entered)
            if slot.deadline < layout.NEVER:
                began = slot.deadline - view.interval(slot)
                yield at, slot.deadline, slot.deadline + max(0.0, until - max(since, began))


class PausingBlock(SlotTimer):
    """A pause, while its block is open; see `blocks.Other`."""

    def __init__(self, page: OwnPage, index: int, entry: float) -> None:
        super().__init__(page, index, entry)
        self._end = end = partial(page.pauses.end, index, entry)
        # However the block ends. With a weak reference's callback and no __del__: who ends a
        # pause as usual runs no code of ours after that, in which an interruption would get lost.
        self._forgotten = weakref.finalize(self, _end_quietly, end)
        self._forgotten.atexit = False

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """End the pause; the other timers go on with what was left to them."""
        try:
            self._end()
        except BaseException:  # an interruption: nothing may stay suspended, or lose its time
            self._end()
            raise

    def cancel(self) -> None:
        """Refuse: a pause without an end would be a switch."""
        raise no_end()


def _end_quietly(end: Callable[[], None]) -> None:
    try:  # noqa: SIM105  # at the interpreter's end, suppress is gone, and whatever else it takes
        end()
    except Exception:
        pass
