"""Signals that ask a process to end, as a descriptor that its loop can wait for."""

from __future__ import annotations

import signal
import socket

from hangwatch.process import wait_readable

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalPipe:
    """Readable once SIGTERM or SIGINT has come. One a process."""

    def __init__(self) -> None:
        self._read_end, self._write_end = socket.socketpair()
        self._read_end.setblocking(False)
        self._write_end.setblocking(False)
        signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        for number in STOPPING_SIGNALS:
            signal.signal(number, lambda *_: None)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._read_end.fileno()

    def take(self) -> bool:
        """Tell whether a signal has come since the last look."""
        try:
            return bool(self._read_end.recv(64))
        except BlockingIOError:
            return False

    def wait(self, seconds: float) -> bool:
        """Wait for a signal; tell whether one has come."""
        wait_readable(self.fileno(), seconds)
        return self.take()

    def close(self) -> None:
        """In a forked child: leave the parent's pipe alone."""
        signal.set_wakeup_fd(-1)
        self._read_end.close()
        self._write_end.close()
