"""Which task of an event loop runs in this thread, without importing any."""

from __future__ import annotations

import sys
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

    Tasks = dict[object, object] | Callable[[object], object]
    """An event loop's current task, by the loop."""


def asyncio_state() -> tuple[Callable[[], object], Tasks] | None:
    """Return what tells this thread's running loop, and what tells the loops' tasks.

    The first is C code, and so is the second, or else a dict: a block asks both at each entry.
    None: asyncio is not imported.
    """
    events, tasks = sys.modules.get("asyncio.events"), sys.modules.get("asyncio.tasks")
    running_loop = getattr(events, "_get_running_loop", None)
    # Since CPython 3.14 there is no dict of them, and a function in C.
    by_loop = getattr(tasks, "_current_tasks", None)
    known: Any = by_loop if type(by_loop) is dict else getattr(tasks, "current_task", None)
    return None if running_loop is None or known is None else (running_loop, known)


def current_task() -> float:
    """Return the identity of the task, of asyncio or trio, or of the greenlet; 0.0: of none."""
    asyncio = asyncio_state()
    if asyncio is not None:
        loop = asyncio[0]()
        if loop is not None:
            known = asyncio[1]
            return float(id(known.get(loop) if isinstance(known, dict) else known(loop)))
    trio = sys.modules.get("trio")
    if trio is not None:
        try:
            return float(id(trio.lowlevel.current_task()))
        except (RuntimeError, AttributeError):  # no loop of trio's runs here; half imported
            pass
    greenlet = sys.modules.get("greenlet")
    try:
        current = None if greenlet is None else greenlet.getcurrent()
    except AttributeError:  # half imported
        return 0.0
    # With gevent, the first greenlet of a thread takes turns with the others, too.
    if current is None or (current.parent is None and "gevent" not in sys.modules):
        return 0.0
    return float(id(current))
