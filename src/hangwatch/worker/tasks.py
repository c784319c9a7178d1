"""Which asyncio task runs, without importing asyncio."""

from __future__ import annotations

import sys
from collections.abc import Callable


def _no_loop() -> None:
    return None


class Asyncio:
    """What asyncio's C code says of this thread, as soon as we have seen it imported.

    Attributes:
        running_loop: returns the loop that runs in this thread, or None.
    """

    running_loop: Callable[[], object] = staticmethod(_no_loop)
    seen = False


def current_task() -> int:
    """Return the identity of the asyncio task that runs in this thread; 0 outside of a loop."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return 0
    try:
        Asyncio.running_loop = staticmethod(asyncio.events._get_running_loop)
        Asyncio.seen = True
        return id(asyncio.current_task())
    except (RuntimeError, AttributeError):  # no loop runs here; half imported
        return 0
