"""A log handler for the watching loop: it loses a record rather than waits for a reader."""

from __future__ import annotations

import logging
import os
import select

# A pipe that poll(2) calls writable takes at least PIPE_BUF bytes without blocking.
_MOST_BYTES = select.PIPE_BUF


class QuietHandler(logging.Handler):
    """Writes records to standard error, in one write each, where that does not block.

    In a helper process, which may block, records are written whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._lost = 0
        self.setFormatter(logging.Formatter("hangwatch: %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or count it as lost."""
        text = self.format(record).rstrip("\n") + "\n"
        data = text.encode("utf-8", "backslashreplace")
        try:
            if os.getpid() != self._pid:
                while data:
                    data = data[os.write(2, data) :]
                return
            poll = select.poll()
            poll.register(2, select.POLLOUT)
            if not any(event & select.POLLOUT for _, event in poll.poll(0)):
                self._lost += 1
                return
            if self._lost:
                data = f"hangwatch: {self._lost} records were lost here\n".encode() + data
                self._lost = 0
            os.write(2, data[:_MOST_BYTES])
        except OSError:  # nobody reads standard error any more
            self._lost += 1


def install() -> None:
    """Make this process's one handler; anew in a fork whose loop must not block either."""
    logger = logging.getLogger("hangwatch")
    logger.handlers[:] = [QuietHandler()]
    logger.setLevel(logging.INFO)
