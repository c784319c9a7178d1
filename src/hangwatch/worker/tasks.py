"""Which task of an event loop runs in this thread, without importing any."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import BuiltinFunctionType

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any


def asyncio_functions() -> tuple[Callable[[], object], Callable[[object], object]] | None:
    """Return what tells this thread's running loop, and that loop's task; None: not imported.

    Both are C code: what Python code would do, a block would pay for at each entry.
    """
    events = sys.modules.get("asyncio.events")
    tasks = sys.modules.get("asyncio.tasks")
    running_loop = getattr(events, "_get_running_loop", None)
    current_task: Any = getattr(tasks, "current_task", None)
    if running_loop is None or current_task is None:
        return None
    if isinstance(current_task, BuiltinFunctionType):
        return running_loop, current_task
    by_loop: Any = getattr(tasks, "_current_tasks", None)  # CPython 3.11
    return running_loop, (current_task if by_loop is None else by_loop.get)


def current_task() -> float:
    """Return the identity of the task, of asyncio or trio, or of the greenlet; 0.0: of none."""
    functions = asyncio_functions()
    if functions is not None:
        loop = functions[0]()
        if loop is not None:
            return float(id(functions[1](loop)))
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
