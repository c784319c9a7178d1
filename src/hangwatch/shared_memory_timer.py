"""The native pair: a client that writes its own page, and a watcher that reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hangwatch.folder import REPORT_DIR
from hangwatch.overrides import is_overridden, remember
from hangwatch.worker.acquired import Acquired
from hangwatch.worker.built_in_client import BuiltInClient
from hangwatch.worker.client import (
    ADDRESS_VARIABLE,
    OFF,
    WorkerClient,
    address_from_environment,
)
from hangwatch.worker.expiration import forget_slots
from hangwatch.worker.slots import Scope

__all__ = ["SharedMemoryTimerClient", "SharedMemoryTimerServer", "serve"]

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.keep.launch import WatcherProcess


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
        after = max(expiration_time - time.time(), 1e-9)
        key = "acquired", id(self), scope_id
        self._acquired.add(
            scope_id, self._worker.choose(key, after, after, Scope(scope_id, keeps=self))
        )

    def release(self, scope_id: str) -> None:
        """Disarm the timer of that name that this thread, or task, acquired last, if any."""
        self._acquired.release(scope_id)

    def _road(self) -> WorkerClient | None:
        return None if is_overridden(self, "acquire", "release") else self._worker


class SharedMemoryTimerServer:
    """A watcher process for the workers of this program.

    Args:
        address: where it listens; by default at a path of its own.
        report_dir: folder of the newest 100 reports; None keeps none.
        on_expiry: ``"reap"`` kills a worker whose block overran, ``"report"`` leaves it alone.
        grace: seconds between SIGTERM and SIGKILL; 0 means SIGKILL at once.
        tree: whether a worker's descendants are killed with it.

    Raises:
        ValueError: `on_expiry` or `grace` is none of these.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        report_dir: str | os.PathLike[str] | None = REPORT_DIR,
        on_expiry: str = "reap",
        grace: float = 0.0,
        tree: bool = True,
    ) -> None:
        if on_expiry not in ("reap", "report"):
            raise ValueError(f"on_expiry must be 'reap' or 'report', not {on_expiry!r}")
        if not 0 <= grace < float("inf"):
            raise ValueError(f"grace must be a number of seconds, 0 or more, not {grace!r}")
        self._wanted_address = None if address is None else os.fspath(address)
        self._report_dir = report_dir
        self._on_expiry = on_expiry
        self._grace = grace
        self._tree = tree
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
        from hangwatch.keep.launch import WatcherProcess

        if self._process is None:
            self._started_by = os.getpid()
            self._process = WatcherProcess(
                self._report_dir, self._on_expiry, self._grace, self._tree, self._wanted_address
            )

    def stop(self) -> None:
        """End the watcher; returns when every report is complete.

        Without a start, or in a forked child of the program that started it, does nothing.
        """
        process, self._process = self._process, None
        if process is not None and self._started_by == os.getpid():
            process.stop()


@contextmanager
def serve(
    *,
    report_dir: str | os.PathLike[str] | None = REPORT_DIR,
    on_expiry: str = "reap",
    grace: float = 0.0,
    tree: bool = True,
) -> Iterator[SharedMemoryTimerServer]:
    """Watch this process and the children that it starts, while the block lasts.

    Children find the watcher by the environment's ``HANGWATCH_ADDRESS``; neither they nor
    this process call `configure`.

    Args:
        report_dir: folder of the newest 100 reports; None keeps none.
        on_expiry: ``"reap"`` kills a worker whose block overran, ``"report"`` leaves it alone.
        grace: seconds between SIGTERM and SIGKILL; 0 means SIGKILL at once.
        tree: whether a worker's descendants are killed with it.

    Yields:
        The watcher that was started.

    Raises:
        ValueError: `on_expiry` or `grace` is none of these.
        LaunchError: the watcher did not become ready.
    """
    server = SharedMemoryTimerServer(
        report_dir=report_dir, on_expiry=on_expiry, grace=grace, tree=tree
    )
    server.start()
    before = os.environ.get(ADDRESS_VARIABLE)
    try:
        assert server.address is not None
        os.environ[ADDRESS_VARIABLE] = server.address
        forget_slots()
        yield server
    finally:
        if os.getpid() == server._started_by:
            if before is None:
                os.environ.pop(ADDRESS_VARIABLE, None)
            else:
                os.environ[ADDRESS_VARIABLE] = before
            forget_slots()
        server.stop()
