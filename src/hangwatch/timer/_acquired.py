"""Timers that were acquired by a call, for which there is no block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hangwatch.worker.tasks import current_task

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.core import Expiration

Holder = tuple[int, float]
"""A thread and, within it, a task of an event loop."""


def holder() -> Holder:
    """Return who calls."""
    return threading.get_ident(), current_task()


class Acquired:
    """What a process has acquired by calls of one client's `acquire`.

    Such a timer stands alone: it may be released before or after any block, and by another
    thread than the one that acquired it.
    """

    def __init__(self) -> None:
        self._open: dict[str, list[tuple[Holder, Expiration]]] = {}
        self._pid = os.getpid()

    def add(self, scope_id: str, block: Expiration, begin: Callable[[], object]) -> None:
        """Note a block for `scope_id`, and begin it."""
        self._forget_parent()
        held = holder(), block
        self._open.setdefault(scope_id, []).append(held)
        try:
            begin()
        except BaseException:
            self._open[scope_id].remove(held)
            raise

    def release(self, scope_id: str, anyones: bool = False) -> bool:
        """Disarm the timer of that name that the caller acquired last.

        Args:
            scope_id: its name.
            anyones: whether to take another thread's or task's, if the caller has none.

        Returns:
            Whether there was one.
        """
        self._forget_parent()
        open_ones = self._open.get(scope_id, [])
        mine = [held for held in open_ones if held[0] == holder()]
        for held in reversed(mine or (open_ones if anyones else [])):
            try:
                open_ones.remove(held)
            except ValueError:  # another thread has released it meanwhile
                continue
            held[1].__exit__(None, None, None)
            if not open_ones:
                self._open.pop(scope_id, None)
            return True
        return False

    def _forget_parent(self) -> None:
        if self._pid != os.getpid():
            # A forked child: what its parent acquired is nothing of its own.
            self._open, self._pid = {}, os.getpid()
