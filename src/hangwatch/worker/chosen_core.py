"""Which core this process runs: `_core`, in C, where it can be right; else `core`."""

from __future__ import annotations

import os
import sys

from hangwatch.page import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType


def _plain() -> ModuleType:
    from hangwatch.worker import core

    return core


def _choose() -> tuple[ModuleType, str | None]:
    """Return the core, and why it is not the one in C, if somebody should know."""
    if os.environ.get("HANGWATCH_PURE", "0") not in ("", "0"):
        return _plain(), None
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return _plain(), None  # nor is it built there: it would turn the GIL on
    try:
        # Not by `from`, which does not tell what is not there from what can't be loaded.
        import hangwatch.worker._core as _core  # type: ignore[import-not-found]
    except ImportError as error:
        # Whoever built it without a compiler knows.
        missing = isinstance(error, ModuleNotFoundError)
        return _plain(), None if missing else f"the core in C can't be loaded ({error})"
    if _core.LAYOUT != layout.VERSION:
        return _plain(), (
            f"the core in C writes layout {_core.LAYOUT} of a page, not {layout.VERSION}: "
            "it is a stale build, install hangwatch anew"
        )
    return _core, None


core, problem = _choose()
"""`hangwatch.worker.core`, or what does the same; and what its user is warned of."""
