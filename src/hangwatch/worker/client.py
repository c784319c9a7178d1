"""A worker's side of the native pair: one page, one connection, one watcher."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic

from hangwatch.errors import HangwatchError, NotConfiguredError, VersionError
from hangwatch.page import layout
from hangwatch.policy import NOTHING_CHOSEN, OnExpiry, happens
from hangwatch.worker import connection, debugger_notice, soft_ending, stack_channel
from hangwatch.worker.arguments import name_of
from hangwatch.worker.blocks import UNWATCHED
from hangwatch.worker.chosen_core import core
from hangwatch.worker.connection import WatcherSocket
from hangwatch.worker.hello import hello_of
from hangwatch.worker.own_page import OwnPage, details_of
from hangwatch.worker.tasks import current_task
from hangwatch.worker.warnings import warn

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.arguments import Asked
    from hangwatch.worker.blocks import Other
    from hangwatch.worker.core import Expiration, Slots

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
        self._page: OwnPage | None = None
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
    def page(self) -> OwnPage:
        """This process's page; it is made at the first arm.

        Raises:
            OSError: it can't be made.
        """
        if self._page is None:
            # Two pages would be one too many: the watcher knows one. The lock is taken
            # and given back in C, so no exception can leave it held.
            with self._making:
                if self._page is None:
                    self._page = OwnPage(partial(_ring, weakref.ref(self)))
                    debugger_notice.call_when_loaded(_note_debugger)
        return self._page

    def begin(
        self,
        block: Expiration,
        asked: Asked,
        *,
        quiet: bool = True,
        nests: bool = True,
        alone: bool = False,
    ) -> Other | None:
        """Arm a block's timer, see `blocks.Transport`; never fails for want of a watcher.

        Args:
            block: the block.
            asked: what its caller chose.
            quiet: whether its thread may enter such a block again without asking.
            nests: whether it may, too, within a block of the same scope.
            alone: whether it has nothing to do with its thread's other blocks: a call's timer.
        """
        if self.address == OFF:
            return _arm_unwatched(block)
        page = self._ready()
        if page is None:
            return UNWATCHED
        task = current_task()
        asks_to_raise = happens(asked.policy, self._server) is OnExpiry.RAISE
        # In a task, it would hit whichever task runs.
        raises = asks_to_raise and task == 0.0 and soft_ending.install(page)
        quiet = quiet and not (asks_to_raise or asked.pauses)
        task = float(id(block)) if alone else task

        def arm() -> bool:
            details = partial(details_of, block, asked)
            armed = bool(page.slots.arm(block, details, task, quiet, nests))
            if armed and raises and block.place is not None:
                soft_ending.note(page, block.place, name_of(block), asked.raises)
            return armed

        if asked.pauses:
            pause = page.pauses.begin(page, block, arm)
            if pause is not None:
                return pause
        elif arm():
            return None
        self._warn_once("full", "as many blocks are open as a page has slots; this one", "")
        return UNWATCHED

    def _ready(self) -> OwnPage | None:
        """Return the page, its watcher informed if there is one; None: it can't be had."""
        if self._page is None:
            if monotonic() < self._try_at:
                return None
            try:
                _ = self.page
            except OSError as error:
                self._try_at = monotonic() + _TRY_AGAIN_AFTER
                self._warn_once("page", f"no page of timers can be made ({error})")
                return None
        if self._socket is None:
            self.ring()  # connect before the block's time begins
        return self._page

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
        self._forget_promise()
        self._on_lost()
        if not self.is_connected:
            self._warn_once("lost", "the watcher is gone")
        return True

    def _forget_promise(self) -> None:
        """Invalidate the watcher's promise, so that the next arm rings."""
        if self._page is not None:
            self._page.words[layout.WATCH_UNTIL] = 0.0

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
        except (HangwatchError, OSError) as error:
            held_up = monotonic() - now > connection.ANSWER_WITHIN / 2
            seldom = held_up or isinstance(error, VersionError)
            self._pause = min(2 * self._pause, _SELDOM) if seldom else _TRY_AGAIN_AFTER
            self._try_at = monotonic() + self._pause
            self._forget_promise()
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
        page = self.page.descriptor.number
        stacks, fenced = stack_channel.open_channel(), core.register_fence()
        watcher = connection.connect(self.address, lambda: hello_of(page, stacks, fenced))
        self._server = watcher.policy
        if watcher.policy.on_expiry is OnExpiry.RAISE:
            soft_ending.install(self.page)
            core.forget_keys()
        self._socket = watcher
        # Who armed while we were at it had nobody to ring.
        watcher.ring()
        self._warned.discard("lost")

    def close(self) -> None:
        """Let go of the page and the connection."""
        own, watcher = self._page, self._socket
        self._page = self._socket = None
        if own is not None:
            own.close()
        if watcher is not None:
            watcher.close()

    def forget_parent(self) -> None:
        """In a forked child: touch nothing of the parent's, and start anew."""
        self._making = threading.RLock()
        self._try_at = 0.0
        self._warned = set()
        self.close()

    def _warn_once(self, kind: str, what: str, who: str = "; this process") -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"{what}{who} runs on unwatched")


_clients: weakref.WeakSet[WorkerClient] = weakref.WeakSet()


def _note_debugger() -> None:
    """Say in every page of this process that a debugger is loaded."""
    core.forks()  # after a fork that Python did not see, the pages are its parent's until then
    for client in list(_clients):
        if client._page is not None:
            client._page.words[layout.DEBUGGER_LOADED] = 1.0


def forget_parent() -> None:
    """In a forked child: touch nothing of the parent's, and start anew."""
    global _unwatched_slots
    _unwatched_slots = None
    for client in list(_clients):
        client.forget_parent()
    stack_channel.forget_channel()


def _ring(client: weakref.ref[WorkerClient]) -> bool:
    """Ring for a page, as long as its client lives."""
    alive = client()
    return alive is not None and alive.ring()


_unwatched_slots: Slots | None = None
"""The slots of blocks that nobody is to watch: memory of our own."""


def _arm_unwatched(block: Expiration) -> Other | None:
    """Arm a block that nobody is to watch, so that its thread enters it without asking again."""
    global _unwatched_slots
    if _unwatched_slots is None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            memory = mmap.mmap(-1, layout.PAGE_BYTES, flags=flags)
            _unwatched_slots = core.Slots(memory, None, layout.CAPACITY)
        except OSError:
            return UNWATCHED
    armed = _unwatched_slots.arm(block, layout.no_details, 0.0, True, True)
    return None if armed else UNWATCHED


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
