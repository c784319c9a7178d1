"""`TimerExpired`, raised in the main thread by a signal of the watcher's.

Python runs a signal's handler in the main thread, between two bytecodes of whatever runs
there, and what it raises is raised at that place. The handler itself looks which block has
overrun: if it has ended meanwhile, nothing is raised. Source: Python's signal module, "Signals
and threads".
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from types import FrameType

from hangwatch.errors import TimerExpired
from hangwatch.page import layout as page
from hangwatch.worker.free_signals import free_signals

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.slots import Slot

Overdue = Callable[[float], "Iterable[Slot]"]
"""Given the time, finds the main thread's overdue blocks that are to be ended softly."""


# They call what is timed from within a ``with`` of their own, as anybody does.
_CALLERS = ("hangwatch.worker.decorated", "hangwatch.worker.iteration")


# Python code that ours calls while it begins or ends a block.
_CALLED = ("asyncio.tasks", "asyncio.events", "threading", "weakref")


class _Handler:
    """The handler of this process; there is one, however many pages it has."""

    number = 0
    overdue: list[Overdue] = []  # noqa: RUF012  # one object, never replaced


def install(overdue: Overdue) -> int:
    """Catch a signal, the first time.

    Args:
        overdue: where the handler looks; asked as long as the process lives.

    Returns:
        The signal's number; 0 if none is free, or this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return 0
    if overdue not in _Handler.overdue:
        _Handler.overdue.append(overdue)
    # A program that took the signal since then has it.
    if not _Handler.number or signal.getsignal(_Handler.number) is not _raise:
        _Handler.number = next(iter(free_signals()), 0)
        try:
            if _Handler.number:
                signal.signal(_Handler.number, _raise)
        except ValueError:  # a subinterpreter, where no handler can be set
            _Handler.number = 0
    return _Handler.number


def _raise(number: int, frame: FrameType | None) -> None:
    now = monotonic()
    slots = [slot for overdue in _Handler.overdue for slot in overdue(now)]
    # Raised in what begins or ends a block, it would keep that from disarming it. If nothing
    # has ended, the watcher asks again.
    if not slots or _is_between(frame):
        return
    # All of them end by it; it is the outermost that catches it.
    outermost = min(slots, key=_depth)
    entry = outermost.words[outermost.entry_at]
    limit, entered = outermost.interval(entry), outermost.entered(entry)
    for slot in slots:
        entry = slot.words[slot.entry_at]
        slot.raised = entry, slot.words[slot.deadline_at]
        slot.words[slot.deadline_at + page.RAISED_ENTRY] = entry
    raise TimerExpired(outermost.scope.name, limit, now - entered)


def _depth(slot: Slot) -> int:
    depth = 0
    around = slot.enclosing
    while around is not None:
        depth, around = depth + 1, around.enclosing
    return depth


def _is_between(frame: FrameType | None) -> bool:
    """Tell whether a block is just being entered or left, by our code or an ExitStack's."""
    while frame is not None and frame.f_globals.get("__name__") in _CALLED:
        frame = frame.f_back
    module = "" if frame is None else frame.f_globals.get("__name__", "")
    if module in _CALLERS:
        return False
    return module == "contextlib" or module.startswith("hangwatch.")
