"""A worker's side of the native pair: one page, one connection, one watcher."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from math import inf
from time import monotonic

from hangwatch import linux
from hangwatch.errors import HangwatchError, NotConfiguredError, VersionError
from hangwatch.page import layout as page
from hangwatch.policy import NOTHING_CHOSEN, OnExpiry, Policy, happens
from hangwatch.worker import connection, debugger_notice, soft_ending, stack_channel
from hangwatch.worker.blocks import PausingBlock
from hangwatch.worker.connection import WatcherSocket
from hangwatch.worker.labels import labels_from
from hangwatch.worker.page_writer import PageWriter
from hangwatch.worker.slots import VOID_SLOT, Scope, Slot, void_slot

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.blocks import Block

ADDRESS_VARIABLE = "HANGWATCH_ADDRESS"
OFF = "off"
_TRY_AGAIN_AFTER = 1.0
_SELDOM = 60.0


class WorkerClient:
    """What `expires` talks to: gives out slots, keeps the watcher informed.

    It connects when it is first needed, and says in one warning if it can't. After
    that the process runs unwatched and tries again at most once a second; ever more seldom
    while somebody listens but doesn't answer, which holds up the caller, or is of another version.

    Args:
        address: path of the watcher's socket, or ``off``.
        on_lost: called when the watcher turns out to be gone; it may `move` this client.
    """

    def __init__(self, address: str, on_lost: Callable[[], None] = lambda: None) -> None:
        self.address = address
        self._on_lost = on_lost
        self._page: PageWriter | None = None
        self._page_again = 0.0
        self._making = threading.RLock()
        self._socket: WatcherSocket | None = None
        self._server = NOTHING_CHOSEN
        self._try_at = 0.0
        self._pause = _TRY_AGAIN_AFTER
        self._warned: set[str] = set()
        _clients.add(self)

    def __repr__(self) -> str:
        state = "off" if self.address == OFF else "connected" if self._socket else "not connected"
        return f"<{type(self).__name__} {self.address!r}, {state}>"

    @property
    def page(self) -> PageWriter:
        """This process's page; it is made at the first arm.

        Raises:
            OSError, ImportError: it can't be made.
        """
        if self._page is None:
            # Two pages would be one too many: the watcher knows one. The lock is taken
            # and given back in C, so no exception can leave it held.
            with self._making:
                if self._page is None:
                    self._page = PageWriter(self.ring, self._warn_full)
                    debugger_notice.call_when_loaded(_note_debugger)
                    if debugger_notice.is_loaded():
                        _note_debugger()
        return self._page

    def choose(self, key: Hashable, after: object, limit: float, scope: Scope) -> Slot | Block:
        """Claim a slot for a block, see `PageWriter.choose`; never fails for want of a watcher."""
        slot = self.claim(key, after, limit, scope)
        if scope.pauses and slot.limit < inf:
            return PausingBlock(slot, self.page.pauses)
        on_expiry = scope.policy.on_expiry or self._server.on_expiry
        if on_expiry is OnExpiry.RAISE and slot.limit < inf:
            self._prepare_to_raise()
        return slot

    def claim(self, key: Hashable, after: object, limit: float, scope: Scope) -> Slot:
        """Claim a slot whatever its block is, see `choose`."""
        if self.address == OFF:
            return void_slot(key, after, scope)
        if self._page is None:
            if monotonic() < self._page_again:
                return VOID_SLOT
            try:
                _ = self.page
            except (OSError, ImportError) as error:
                self._page_again = monotonic() + _TRY_AGAIN_AFTER
                self._warn_once("page", f"no page of timers can be made ({error})")
                return VOID_SLOT
        if self._socket is None:
            self.ring()  # connect before the block's time begins
        return self.page.choose(key, after, limit, scope)

    def _prepare_to_raise(self) -> None:
        """Let the watcher interrupt the main thread; does nothing in others."""
        number = soft_ending.install(self._overdue)
        if number:
            self.page.make_interruptible()
            self.page.words[page.RAISE_SIGNAL] = number

    def _overdue(self, now: float) -> list[Slot]:
        if self._page is None:
            return []
        return self._page.overdue_in_this_thread(now, self._raises)

    def _raises(self, block: Policy) -> bool:
        return happens(block, self._server) is OnExpiry.RAISE

    def ring(self) -> bool:
        """Have the watcher look at this process's page, connecting first if need be.

        Returns:
            Whether it tried to connect, which takes time.
        """
        watcher = self._socket
        if watcher is None:
            problem = self.try_to_connect()
            if problem is not None:
                self._warn_once("connect", str(problem))
            return True
        if watcher.ring():
            return False
        self._socket = None
        self._try_at = monotonic() + _TRY_AGAIN_AFTER
        self._warned.discard("connect")
        watcher.close()
        self._expect_nobody()
        self._on_lost()
        if not self.is_connected:
            self._warn_once("lost", "the watcher is gone")
        return True

    def _expect_nobody(self) -> None:
        """Keep no thread quiet by what a watcher promised that we don't have, or not any more."""
        if self._page is not None:
            self._page.words[page.WATCH_UNTIL] = 0.0

    @property
    def is_connected(self) -> bool:
        """Whether the watcher has this process's page, as far as we know."""
        return self._socket is not None

    def try_to_connect(self) -> Exception | None:
        """Connect, at most once a second; return what went wrong with this attempt."""
        # No calls between the look and the claim: one thread alone connects.
        now = monotonic()
        if now < self._try_at:
            return None
        self._try_at = now + 2 * connection.ANSWER_WITHIN
        try:
            self.connect()
        except (HangwatchError, OSError, ImportError) as error:
            held_up = monotonic() - now > connection.ANSWER_WITHIN / 2
            seldom = held_up or isinstance(error, VersionError)
            self._pause = min(2 * self._pause, _SELDOM) if seldom else _TRY_AGAIN_AFTER
            self._try_at = monotonic() + self._pause
            self._expect_nobody()
            return error
        self._pause = _TRY_AGAIN_AFTER
        return None

    def move(self, address: str) -> None:
        """Connect to another watcher at once, if there is one: what is armed stays watched."""
        self.address = address
        self._try_at = 0.0
        self.try_to_connect()

    def connect(self) -> None:
        """Hand the page to the watcher.

        Raises:
            HangwatchError: see `connection.connect`.
            OSError: no memory or no descriptor is left for a page.
        """
        watcher = connection.connect(
            self.address,
            self.page.descriptor.number,
            stack_channel.open_channel(),
            linux.register_fence(),
            labels_from(os.environ),
        )
        self._server = watcher.policy
        if watcher.policy.on_expiry is OnExpiry.RAISE:
            self._prepare_to_raise()
        self._socket = watcher
        # Who armed while we were at it had nobody to ring.
        watcher.ring()
        self._warned.discard("lost")

    def close(self) -> None:
        """Let go of the page and the connection."""
        own, watcher = self._page, self._socket
        self._page = self._socket = None
        if own is not None:
            own.descriptor.close()
        if watcher is not None:
            watcher.close()

    def forget_parent(self) -> None:
        """In a forked child: touch nothing of the parent's, and start anew."""
        own = self._page
        self._making = threading.RLock()
        self._try_at = self._page_again = 0.0
        self._warned = set()
        if own is not None:
            own.make_private()
        self.close()

    def _warn_full(self) -> None:
        self._warn_once("full", "as many blocks are open as a page has slots; this one")

    def _warn_once(self, kind: str, what: str) -> None:
        if kind in self._warned:
            return
        self._warned.add(kind)
        import logging

        ending = " is unwatched" if kind == "full" else "; this process runs on unwatched"
        logging.getLogger("hangwatch").warning("hangwatch: %s%s", what, ending)


_clients: weakref.WeakSet[WorkerClient] = weakref.WeakSet()


def all_slots() -> list[Slot]:
    """Return the slots of this process, of all clients and threads."""
    pages = [client._page for client in list(_clients)]
    return [slot for page in pages if page is not None for slot in page.all_slots()]


def _note_debugger() -> None:
    """Say in every page of this process that a debugger is loaded."""
    for client in list(_clients):
        if client._page is not None:
            client._page.words[page.DEBUGGER_LOADED] = 1.0


def _after_fork() -> None:
    for client in list(_clients):
        client.forget_parent()
    stack_channel.forget_channel()


os.register_at_fork(after_in_child=_after_fork)


_by_address: dict[str, WorkerClient] = {}


def client_at(address: str) -> WorkerClient:
    """Return this process's one client for an address from the environment."""
    client = _by_address.get(address)
    return _by_address.setdefault(address, WorkerClient(address)) if client is None else client


def address_from_environment() -> str:
    """Return the address that the environment names.

    Raises:
        NotConfiguredError: it names none: whoever launched this process is at fault.
    """
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise NotConfiguredError
    return address
