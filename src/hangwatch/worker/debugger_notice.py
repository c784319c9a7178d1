"""Notices that a Python debugger is loaded into this process: bdb (so pdb, too), or pydevd.

The watcher can't see that from outside without stacks. `import` asks the finders of
`sys.meta_path` for every module that is not loaded yet; ours finds nothing and takes note.
Source: Python's importlib, "The meta path".
"""

from __future__ import annotations

import sys
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_DEBUGGERS = ("bdb", "pydevd")


class _Notice:
    """A finder that finds nothing.

    Args:
        on_loaded: called when a debugger is about to be loaded, in the importing thread.
    """

    def __init__(self, on_loaded: Callable[[], None]) -> None:
        self._on_loaded = on_loaded

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in _DEBUGGERS:
            self._on_loaded()
        return None


def is_loaded() -> bool:
    """Tell whether a debugger has been loaded."""
    return any(name in sys.modules for name in _DEBUGGERS)


def call_when_loaded(on_loaded: Callable[[], None]) -> None:
    """Call a function whenever a debugger is about to be loaded; only the first call counts."""
    if not any(isinstance(finder, _Notice) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Notice(on_loaded))
