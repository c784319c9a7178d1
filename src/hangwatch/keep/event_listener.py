"""Hearing what a watcher tells the program that launched it."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable

from hangwatch.watcher.events import MOST_BYTES, Event

_log = logging.getLogger("hangwatch.keep")


class EventListener:
    """Calls back, in a thread of this process, with each event of one watcher.

    Args:
        on_event: called with each event; what it raises is logged.

    Attributes:
        theirs: the watcher's end of the line; ours to close with `listen`.
    """

    def __init__(self, on_event: Callable[[Event], object]) -> None:
        self._on_event = on_event
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._listen, name="hangwatch-events", daemon=True)

    def listen(self) -> None:
        """Begin, once the watcher has its end."""
        self.theirs.close()
        self._thread.start()

    def close(self) -> None:
        """Give up before `listen`: there is no watcher."""
        self.theirs.close()
        self._ours.close()

    def has_ended(self) -> bool:
        """Tell whether no watcher is at the other end any more."""
        return not self._thread.is_alive()

    def stop(self, within: float) -> None:
        """Wait until all that was told is heard, some seconds at most, and hear no more."""
        mine = self._thread is threading.current_thread()
        if not mine:
            self._thread.join(within)
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        if not mine:
            self._thread.join(0.05)

    def _listen(self) -> None:
        with self._ours:
            while True:
                message = self._ours.recv(MOST_BYTES)
                if not message:
                    return
                try:
                    self._on_event(json.loads(message))
                except BaseException:  # a callback's sys.exit() must not end this thread
                    _log.exception("what the watcher tells could not be passed on")
