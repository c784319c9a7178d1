"""The native pair: a client that writes its own page, and the watcher that reads it."""

from __future__ import annotations

import os
import threading
import time

from hangwatch import api
from hangwatch.worker.client import OFF, WorkerClient, address_from_environment
from hangwatch.worker.page_writer import Slot

__all__ = ["SharedMemoryTimerClient"]


class SharedMemoryTimerClient(api.TimerClient):
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
        self._held: dict[tuple[int, str], list[Slot]] = {}
        if self._worker.address != OFF:
            self._worker.connect()

    def __repr__(self) -> str:
        return f"<SharedMemoryTimerClient of {self._worker!r}>"

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Arm a timer that expires at `expiration_time`, in seconds since the epoch."""
        after = max(expiration_time - time.time(), 1e-9)
        slot = self._worker.choose((self, scope_id), after, after, scope_id)
        api.arm(slot)
        self._held.setdefault((threading.get_ident(), scope_id), []).append(slot)

    def release(self, scope_id: str) -> None:
        """Disarm the timer of that name that this thread acquired last, if there is one."""
        held = self._held.get((threading.get_ident(), scope_id))
        if held:
            held.pop().exit(None, None, None)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ("acquire", "release"):
            api.forget_slots()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in ("acquire", "release"):
            api.forget_slots()

    def _worker_client(self) -> WorkerClient | None:
        # Who replaced or overrode a method wants it called.
        for name in ("acquire", "release"):
            replaced = name in vars(self)
            overridden = getattr(type(self), name) is not getattr(SharedMemoryTimerClient, name)
            if replaced or overridden:
                return None
        return self._worker
