"""What a worker is told of: a line, which can't raise, nor block, and imports nothing."""

from __future__ import annotations

import os
import select
import sys

from hangwatch.worker.own_descriptor import file_of

_STDERR = 2
# A program that has closed it since then may have a file of its own there, or a connection.
_known = None if sys.__stderr__ is None else file_of(_STDERR)


def warn(what: str) -> None:
    """Log a warning if `logging` is loaded, as a program's own code does it; else to stderr.

    There it is lost if standard error is another file than when hangwatch was imported, or has
    no room at the moment.
    """
    # At the interpreter's end, without descriptors, with a handler that fails: never mind.
    try:
        logging = sys.modules.get("logging")
        if logging is not None and hasattr(logging, "getLogger"):
            logging.getLogger("hangwatch").warning("hangwatch: %s", what)
        elif sys.stderr is not None and file_of(_STDERR) == _known is not None:
            room = select.poll()
            room.register(_STDERR, select.POLLOUT)
            # So much fits into a pipe that is ready, and no signal comes of one that is broken.
            if room.poll(0) == [(_STDERR, select.POLLOUT)]:
                line = f"hangwatch: {what}".encode(errors="backslashreplace")
                os.write(_STDERR, line[: select.PIPE_BUF - 1] + b"\n")
    except Exception:
        pass
