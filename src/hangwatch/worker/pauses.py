"""What suspends the timers of one page: `hangwatch.paused`.

While a block that pauses is armed, the watcher passes over all others. When the last one
ends, each other open block gets back the time that it was suspended for: its deadline is
moved first, the pause ends after that, so nobody ever sees the one without the other.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from time import monotonic

from hangwatch.page import layout

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.page.view import View
    from hangwatch.worker.slots import Slot


class Pauses:
    """The pauses of one page.

    Args:
        view: what the page says.
        words: the page's words, to be changed.
    """

    def __init__(self, view: View, words: memoryview[float]) -> None:
        self._view = view
        self._words = words
        self._pid = os.getpid()
        # Reentrant: a signal handler may pause, too. Taken and given back in C, so no
        # exception can leave it held.
        self._lock = threading.RLock()
        self._since = 0.0
        self._pausing: list[tuple[Slot, float]] = []
        # With a weak reference's callback and no __del__: who ends a pause as usual runs no code
        # of ours after that, in which an interruption would get lost.
        self._holders: dict[tuple[int, float], weakref.ref[object]] = {}
        # Where, from, to: made once a pause, so that what was interrupted can be done again.
        self._moves: list[tuple[int, float, float]] | None = None

    def are_open(self) -> bool:
        """Tell whether the page's timers are suspended."""
        # Mostly none was ever begun, and nothing needs to be read.
        return bool(self._pausing) and self._view.is_paused()

    def stand_since(self) -> float | None:
        """Return since when the page's timers are suspended; None: they run."""
        return self._since if self.are_open() else None

    def begin(self, slot: Slot, held_by: object) -> None:
        """Arm a slot whose block pauses; if that raises, `end` it.

        Args:
            slot: the slot, claimed.
            held_by: once nobody has this any more, the pause ends: after an exception at the
                very entry of what would have ended it, for example.
        """
        with self._lock:
            self._forget_ended()
            forgotten = partial(self._forgotten, slot, slot.entry)
            self._holders[slot.index, slot.entry] = weakref.ref(held_by, forgotten)
            if not self._pausing:
                self._since = monotonic()
                self._moves = None
            self._pausing.append((slot, slot.entry))
            slot.arm()

    def end(self, slot: Slot, entry: float) -> None:
        """End the pause that armed `slot` as `entry`; a second time does nothing."""
        if os.getpid() != self._pid:
            return  # a forked child: the pause is its parent's, and so may the lock be
        with self._lock:
            if not slot.is_open(entry):
                self._holders.pop((slot.index, entry), None)
                return
            self._forget_ended()
            if self._pausing in ([(slot, entry)], []):
                if self._moves is None:
                    self._moves = list(self._moves_of(self._since, monotonic()))
                for at, before, after in self._moves:
                    # No calls: another thread may end or renew its block meanwhile.
                    if self._words[at] == before:
                        self._words[at] = after
            slot.exit(None, None, None)
            self._holders.pop((slot.index, entry), None)
        # What was suspended may be due before the watcher looks again.
        slot.ring()

    def _forgotten(self, slot: Slot, entry: float, holder: object) -> None:
        # At the interpreter's end there may be nothing left to do it with.
        with contextlib.suppress(Exception):
            self.end(slot, entry)

    def _forget_ended(self) -> None:
        self._pausing = [
            (slot, entry)
            for slot, entry in self._pausing
            if self._view.is_watched(slot.index, entry)
        ]

    def _moves_of(self, since: float, until: float) -> Iterator[tuple[int, float, float]]:
        """Yield which words of suspended blocks must change, and how."""
        view = self._view
        for slot in view.open_slots().values():
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
