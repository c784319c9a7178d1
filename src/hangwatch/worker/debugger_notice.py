"""Notices that a Python debugger is loaded into this process: bdb (so pdb, too), or pydevd.

The watcher can't see that from outside without stacks. `import` asks the finders of
`sys.meta_path` for every module that is not loaded yet; ours finds nothing and takes note.
Source: Python's importlib, "The meta path".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

_DEBUGGERS = ("bdb", "pydevd")


def call_when_loaded(on_loaded: Callable[[], None]) -> None:
    """Call a function if a debugger was loaded, and, in the importing thread, before one is.

    Of several functions, only the last one is called later.
    """
    global _on_loaded
    _on_loaded = on_loaded
    if not any(finder is _finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _finder)
    if any(name in sys.modules for name in _DEBUGGERS):
        on_loaded()


def _find_spec(name: str, path: object = None, target: object = None) -> None:
    if name in _DEBUGGERS:
        _on_loaded()


_on_loaded: Callable[[], None] = lambda: None  # noqa: E731
_finder = SimpleNamespace(find_spec=_find_spec)
