"""Hangwatch's own pair: a client that writes its own page, and a watcher that reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hangwatch.timer._acquired import Acquired
from hangwatch.timer._built_in_client import BuiltInClient
from hangwatch.timer._overrides import is_overridden, remember
from hangwatch.worker.arguments import NOTHING_ASKED
from hangwatch.worker.client import (
    ADDRESS_VARIABLE,
    OFF,
    WorkerClient,
    address_from_environment,
)
from hangwatch.worker.expiration import forget_keys, timer

__all__ = ["SharedMemoryTimerClient", "SharedMemoryTimerServer", "serve"]

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from hangwatch.keep.event_listener import EventListener
    from hangwatch.keep.launch import WatcherProcess
    from hangwatch.watcher.events import Event
    from hangwatch.watcher.settings import Options

_EVENTS_WITHIN = 5.0


@remember("acquire", "release")
class SharedMemoryTimerClient(BuiltInClient):
    """A worker's client of the watcher at one address.

    Args:
        address: path of the watcher's socket, or ``off`` for timers that nobody
            watches; by default what the environment's ``HANGWATCH_ADDRESS`` says.

    Raises:
        NotConfiguredError: no address is given, and the environment names none.
        AddressError: the address can't be a watcher's.
        WatcherUnavailableError: nobody answers there, or refuses this process.
        ProtocolError: whoever answers there is no watcher of this version.
    """

    def __init__(self, address: str | os.PathLike[str] | None = None) -> None:
        self._worker = WorkerClient(
            address_from_environment() if address is None else os.fspath(address)
        )
        self._acquired = Acquired()
        if self._worker.address != OFF:
            try:
                self._worker.connect()
            except BaseException:
                self._worker.close()
                raise

    def __repr__(self) -> str:
        return f"<SharedMemoryTimerClient of {self._worker!r}>"

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Arm a timer that expires at `expiration_time`, in seconds since the epoch."""
        block = timer(max(expiration_time - time.time(), 1e-9), scope_id)
        self._acquired.add(
            scope_id,
            block,
            lambda: self._worker.begin(block, NOTHING_ASKED, quiet=False, alone=True),
        )

    def release(self, scope_id: str) -> None:
        """Disarm the timer of that name that this thread, or task, acquired last, if any."""
        self._acquired.release(scope_id)

    def _hangwatch_transport(self) -> WorkerClient | None:
        return None if is_overridden(self, "acquire", "release") else self._worker


class SharedMemoryTimerServer:
    """A watcher process for the workers of this program.

    Args:
        address: where it listens; by default at a path of its own.
        options: as of `serve`.

    Raises:
        ValueError, TypeError: an option is none of what it may be: the caller's fault.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event must be callable, not {type(on_event).__name__}")
        from hangwatch.watcher.settings import checked_settings

        self._settings = checked_settings(**options)
        self._wanted_address = None if address is None else os.fspath(address)
        self._on_event = on_event
        self._listener: EventListener | None = None
        self._process: WatcherProcess | None = None
        self._started_by = 0

    def __repr__(self) -> str:
        state = f"at {self.address!r}" if self._process else "not started"
        return f"<SharedMemoryTimerServer {state}>"

    @property
    def address(self) -> str | None:
        """Where it listens; None while it is not started."""
        return None if self._process is None else self._process.address

    @property
    def pid(self) -> int | None:
        """The watcher's process id; None while it is not started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the watcher; returns when workers can connect. A second start does nothing.

        Raises:
            LaunchError: it did not become ready.
        """
        from hangwatch.keep.event_listener import EventListener
        from hangwatch.keep.launch import WatcherProcess

        if self._process is not None:
            return
        self._started_by = os.getpid()
        if self._on_event is None:
            self._process = WatcherProcess(self._settings, self._wanted_address)
            return
        listener = EventListener(self._pass_on)
        try:
            self._process = WatcherProcess(
                self._settings, self._wanted_address, listener.theirs.fileno()
            )
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        listener.listen()

    def stop(self) -> None:
        """End the watcher; returns when every report is complete, and every event told.

        Without a start, or in a forked child of the program that started it, does nothing.
        """
        process, self._process = self._process, None
        listener, self._listener = self._listener, None
        if process is not None and self._started_by == os.getpid():
            process.stop()
            if listener is not None:
                listener.stop(_EVENTS_WITHIN)

    def _pass_on(self, event: Event) -> None:
        if event["event"] != "alive" and self._on_event is not None:
            self._on_event(event)


@contextmanager
def serve(
    *, on_event: Callable[[Event], object] | None = None, **options: Unpack[Options]
) -> Iterator[SharedMemoryTimerServer]:
    """Watch this process and the children that it starts, while the block lasts.

    Children find the watcher by the environment's ``HANGWATCH_ADDRESS``; neither they nor
    this process call `configure`.

    Args:
        on_event: called, in a thread of this process, with each event as a dict; see
            docs/events.md. What it raises is logged.
        options: what to do about a block that overran, all by keyword:
            ``report_dir``: folder of the newest 100 reports; None keeps none.
            ``on_expiry``: of blocks that don't say: ``"reap"`` kills the worker, ``"raise"``
            raises `TimerExpired` in the block first, ``"report"`` leaves the worker alone.
            ``force``: whether that overrides what blocks say.
            ``grace``: seconds that a worker has after each step before SIGKILL; 0: none. By
            default SIGKILL comes at once, but 5 s after a ``signal`` or `TimerExpired`.
            ``signal``: number of the signal that is sent first; by default SIGTERM if there
            is a grace.
            ``tree``: whether a worker's descendants are killed with it.
            ``gap``: seconds that a connected worker may stay outside of every block; None: for
            ever.
            ``stacks``: whether a worker is asked for its Python stacks.
            ``kill_debugged``: whether a worker under a debugger is treated as any other.
            ``allow_uids``: other users, numbers or names, whose processes are watched, too;
            only root can.

    Yields:
        The watcher that was started.

    Raises:
        ValueError, TypeError: an option is none of what it may be: the caller's fault.
        LaunchError: the watcher did not become ready, or may not watch other users' processes.
    """
    server = SharedMemoryTimerServer(on_event=on_event, **options)
    server.start()
    before = os.environ.get(ADDRESS_VARIABLE)
    try:
        assert server.address is not None
        os.environ[ADDRESS_VARIABLE] = server.address
        forget_keys()
        yield server
    finally:
        if os.getpid() == server._started_by:
            if before is None:
                os.environ.pop(ADDRESS_VARIABLE, None)
            else:
                os.environ[ADDRESS_VARIABLE] = before
            forget_keys()
        server.stop()
