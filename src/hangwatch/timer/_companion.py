"""The companion watcher of a drop-in server: a process that the pair's clients connect to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from hangwatch.errors import AddressError, LaunchError
from hangwatch.folder import known_folder
from hangwatch.keep.address import check_folder
from hangwatch.keep.event_listener import EventListener
from hangwatch.keep.launch import WatcherProcess
from hangwatch.timer import _place
from hangwatch.watcher.events import Event
from hangwatch.watcher.settings import checked_settings


class CompanionWatcher:
    """A watcher that the clients of one queue, or FIFO, find.

    Starts the watcher, and writes its address file.

    Args:
        link: the address file, where they look for it; see `_place`.
        report_dir: the report folder; None keeps no reports.
        on_event: called, in a thread of this process, with each of the watcher's events.

    Raises:
        LaunchError: it did not become ready, or its address file can't be written.
    """

    def __init__(
        self,
        link: str,
        report_dir: str | os.PathLike[str] | None,
        on_event: Callable[[Event], None],
    ) -> None:
        self._link = link
        self._listener = EventListener(on_event)
        try:
            settings = replace(checked_settings(report_dir=report_dir), spared_pid=os.getpid())
            self._process = WatcherProcess(settings, events=self._listener.theirs.fileno())
            try:
                check_folder(known_folder())
                _place.sweep()
                _place.publish(link, self._process.address)
            except (OSError, AddressError) as error:
                self._process.stop()
                raise LaunchError(f"the watcher can't be made known to workers: {error}") from None
        except BaseException:
            self._listener.close()
            raise
        self._listener.listen()

    @property
    def pid(self) -> int:
        """The process id of its keeper."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Tell whether neither keeper nor watcher is left; one of them alone goes on."""
        return self._listener.has_ended() and self._process.ended() is not None

    def show(self) -> None:
        """Write the address file again, if somebody removed it."""
        if not os.path.lexists(self._link):
            with contextlib.suppress(OSError):
                _place.publish(self._link, self._process.address)

    def tell_to_stop(self) -> None:
        """Remove the address file, and ask the watcher to end; does not wait."""
        _place.withdraw(self._link, self._process.address)
        self._process.tell_to_stop()

    def stop(self, until: float) -> None:
        """Wait until its reports are complete and all events have come, or `until`.

        It finishes by itself what it has begun by then.
        """
        self._process.stop(max(0.0, until - monotonic()))
        self._listener.stop(max(0.0, until - monotonic()))
