"""Timers that were acquired by a call, and not by a block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hangwatch.worker.slots import Slot
from hangwatch.worker.tasks import current_task

Holder = tuple[int, int]
"""A thread and, within it, an asyncio task."""


def holder() -> Holder:
    """Return who calls."""
    return threading.get_ident(), current_task()


class Acquired:
    """What a process has acquired by calls of one client's `acquire`.

    Such a timer stands alone: it may be released before or after any block, and by another
    thread than the one that acquired it.
    """

    def __init__(self) -> None:
        # Of a slot only what disarms it: held by us, it survives the end of its thread.
        self._exits: dict[str, list[tuple[Holder, Callable[..., None]]]] = {}
        self._pid = os.getpid()

    def add(self, scope_id: str, slot: Slot) -> None:
        """Arm a slot that was claimed for `scope_id`."""
        self._forget_parent()
        held = holder(), slot.exit
        self._exits.setdefault(scope_id, []).append(held)
        try:
            slot.arm()
        except BaseException:
            self._exits[scope_id].remove(held)
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
        exits = self._exits.get(scope_id, [])
        mine = [held for held in exits if held[0] == holder()]
        for held in reversed(mine or (exits if anyones else [])):
            try:
                exits.remove(held)
            except ValueError:  # another thread has released it meanwhile
                continue
            held[1](None, None, None)
            if not exits:
                self._exits.pop(scope_id, None)
            return True
        return False

    def _forget_parent(self) -> None:
        if self._pid != os.getpid():
            # A forked child: what its parent acquired is nothing of its own.
            self._exits, self._pid = {}, os.getpid()
