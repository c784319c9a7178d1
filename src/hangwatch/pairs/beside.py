"""The native road of a drop-in server: a watcher process beside the legacy transport."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from time import monotonic

from hangwatch.errors import AddressError, LaunchError
from hangwatch.folder import known_folder
from hangwatch.keep.address import check_folder
from hangwatch.keep.launch import WatcherProcess
from hangwatch.pairs import place
from hangwatch.watch.events import MOST_BYTES, Event

_log = logging.getLogger("hangwatch")


class WatcherBeside:
    """A watcher that the clients of one queue, or FIFO, find.

    Args:
        link: where they look for it; see `place`.
        report_dir: the report folder; None keeps no reports.
        on_event: called, in a thread of this process, with what the watcher tells.

    Raises:
        LaunchError: it did not become ready, or its place can't be made known.
    """

    def __init__(
        self,
        link: str,
        report_dir: str | os.PathLike[str] | None,
        on_event: Callable[[Event], None],
    ) -> None:
        self._link = link
        self._on_event = on_event
        self._events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = WatcherProcess(report_dir, events=theirs.fileno(), spares_us=True)
            try:
                check_folder(known_folder())
                place.sweep()
                place.publish(link, self._process.address)
            except (OSError, AddressError) as error:
                self._process.stop()
                raise LaunchError(f"the watcher can't be made known to workers: {error}") from None
        except BaseException:
            self._events.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="hangwatch-events", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process id of its keeper."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Tell whether neither keeper nor watcher is left; one of them alone goes on."""
        return not self._thread.is_alive() and self._process.ended() is not None

    def show(self) -> None:
        """Let clients find it again, if somebody removed the link, or another took it down."""
        if not os.path.lexists(self._link):
            with contextlib.suppress(OSError):
                place.publish(self._link, self._process.address)

    def tell_to_stop(self) -> None:
        """Let no more clients find it, and ask it to end; does not wait."""
        place.withdraw(self._link, self._process.address)
        self._process.tell_to_stop()

    def stop(self, until: float) -> None:
        """Wait until its reports are complete and all events are told, or `until`.

        What it has begun by then it ends by itself.
        """
        self._process.stop(max(0.0, until - monotonic()))
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.0, until - monotonic()))
        with contextlib.suppress(OSError):
            self._events.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(0.05)

    def _listen(self) -> None:
        with self._events:
            while True:
                message = self._events.recv(MOST_BYTES)
                if not message:
                    return
                try:
                    self._on_event(json.loads(message))
                except BaseException:  # a callback's sys.exit() must not end this thread
                    _log.exception("what the watcher tells could not be passed on")
