"""What a worker is told of: a line, which can't raise, and imports nothing."""

from __future__ import annotations

import os
import sys


def warn(what: str) -> None:
    """Log a warning if `logging` is loaded, as a program's own code does it; else to stderr."""
    # At the interpreter's end, without descriptors, with a handler that fails: never mind.
    try:
        logging = sys.modules.get("logging")
        if logging is not None and hasattr(logging, "getLogger"):
            logging.getLogger("hangwatch").warning("hangwatch: %s", what)
        elif sys.stderr is not None:
            os.write(2, f"hangwatch: {what}\n".encode(errors="backslashreplace"))
    except Exception:
        pass
