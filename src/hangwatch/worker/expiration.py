"""`expires`, `configure`, and which road a block takes.

The quiet path of a block is `expires`, the look-up of ``__exit__``, and
``__enter__``: no system call, no lock, nothing that can raise once the timer is
armed. Leaving is one call of C code. `benchmarks/arm.py` measures it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Hashable
from time import monotonic
from types import CodeType

from hangwatch.errors import UnsupportedError
from hangwatch.page.layout import WATCH_UNTIL
from hangwatch.policy import OnExpiry
from hangwatch.worker.acquired import Holder, holder
from hangwatch.worker.arguments import (
    NOTHING_ASKED,
    Asked,
    check_client,
    checked_limit,
    scope_of,
)
from hangwatch.worker.blocks import UNWATCHED, ContractBlock, NoThread, SlotTimer, cannot
from hangwatch.worker.by_hand import ByHand, not_entered
from hangwatch.worker.client import OFF
from hangwatch.worker.handle import (
    AsyncExit,
    AsyncExitLookup,
    Done,
    ExitLookup,
    Handle,
    not_open,
    open_timer,
)
from hangwatch.worker.roads import Configured, find_road
from hangwatch.worker.slots import VOID_SLOT, Slot
from hangwatch.worker.tasks import Asyncio as _Asyncio

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from hangwatch.worker.blocks import Block, ContractClient, Timer

    Function = TypeVar("Function", bound=Callable[..., Any])

_getframe = sys._getframe


class _NoChoice:
    """In the place of a slot, while no look at ``__exit__`` has put one there."""

    thread = NoThread


_FRESH = _NoChoice()
"""Nobody has looked at ``__exit__`` yet."""
_USED = _NoChoice()
"""Somebody has; what a thread chose since is that thread's own."""


class _PerThread(threading.local):
    """The slots that this thread's next blocks find by their key."""

    def __init__(self) -> None:
        self.slots: dict[Hashable, Slot] = {}
        # The choice for a block that is about to be entered off the quiet path, and that block.
        self.road: tuple[object, Slot | Block | _NoChoice] = None, _USED

    def all_slots(self) -> list[Slot]:
        """Return this thread's slots, those that no key finds any more included."""
        threads = {id(slot.thread): slot.thread for slot in self.slots.values()}
        return [slot for thread in threads.values() for slot in thread.all_slots()]


_local = _PerThread()
_shared = threading.RLock()
"""Held while what several threads may change of one Expiration is changed."""


def forget_slots() -> None:
    """Make every thread look its slots up again: another client, or another process."""
    global _local
    _local = _PerThread()


def _after_fork() -> None:
    global _shared
    _shared = threading.RLock()
    forget_slots()


os.register_at_fork(after_in_child=_after_fork)


def configure(timer_client: ContractClient | None) -> None:
    """Set the client of every block of this process that names none.

    Args:
        timer_client: the client; None unsets it, and `expires` then raises whatever
            the environment says.

    Raises:
        TypeError: it has no ``acquire`` and ``release``.
    """
    if timer_client is not None:
        check_client(timer_client)
    Configured.client = timer_client
    Configured.by_environment = False
    forget_slots()


class Expiration(Handle):
    """A block's timer: what `expires` returns.

    It is a context manager, an asynchronous one, and a decorator. One object may be entered
    again and again, also while it is entered. While it is, it is the handle of its innermost
    block in the calling thread, or task; if it has only one, of that, for other threads, too.
    """

    __slots__ = ("_after", "_asked", "_code", "_key", "_opened", "_slot")

    # Set by `expires`; an __init__ would cost as much as all the rest of it.
    _after: float
    _asked: Asked
    _code: CodeType
    _key: Hashable
    _opened: list[tuple[Holder, Timer]]
    _slot: Any

    def __enter__(self) -> Expiration:
        now = monotonic()
        slot = self._slot
        if slot.thread.alone is not slot or (_Asyncio.seen and _Asyncio.running_loop()):
            slot = self._begin(slot)
        self._slot = _USED
        words = slot.words
        try:
            # No calls from here to the return of a quiet block: see PageWriter. The order
            # of entry, deadline and watch_until is the protocol's: tests/model/protocol.pml.
            words[slot.entry_at] = slot.entry
            words[slot.deadline_at] = deadline = now + slot.limit
            if now < words[WATCH_UNTIL] <= deadline:
                return self
            if slot.ring():
                # It was a handshake, which is not the block's time.
                words[slot.deadline_at] = monotonic() + slot.limit
                if monotonic() >= deadline:
                    # The first deadline may have been found overdue, and the other one not yet.
                    slot.ring()
        except BaseException:
            words[slot.deadline_at] = 0.0
            raise
        return self

    def _look_up_exit(self) -> Callable[..., None]:
        try:
            slot = _local.slots[self._key]
            if slot.independent or slot.is_alone_in_scope():
                # No calls: from the look to the claim, no other thread may take the slot.
                if (
                    slot.after is self._after
                    and slot.words[slot.deadline_at] == 0.0
                    and self._slot is _FRESH
                ):
                    slot.entry += 1.0
                    slot.block = self
                    self._slot = slot
                    return slot.exit
        except (KeyError, TypeError):
            pass
        unheld = self._unheld_slot()
        if unheld is not None:
            return unheld.exit
        key = self._key
        if isinstance(key, ByHand):
            return self._leave
        # Other threads may enter this object at the same time: the choice is this thread's.
        road = self._choose(key)
        _local.road = self, road
        self._slot = _USED
        return road.exit

    def _look_up_async_exit(self) -> Callable[..., Done]:
        return AsyncExit(self._look_up_exit())

    if TYPE_CHECKING:

        def __exit__(self, *exc_info: object) -> None: ...
        async def __aenter__(self) -> Expiration: ...
        async def __aexit__(self, *exc_info: object) -> None: ...
    else:
        __exit__ = ExitLookup(_look_up_exit)

        def __aenter__(self) -> Done:
            return Done(self.__enter__())

        __aexit__ = AsyncExitLookup(_look_up_async_exit)

    def __call__(self, function: Function) -> Function:
        """Decorate a function: each call is a block.

        Args:
            function: a function, a coroutine function, a generator or an async generator; the
                timer of a generator runs only while it is at work on its next item.

        Raises:
            TypeError: it is none of these: the caller's fault.
        """
        from hangwatch.worker.decorated import decorate  # takes long

        return decorate(function, self._again)

    def _timer(self) -> Timer:
        try:
            slot = _local.slots.get(self._key)
        except TypeError:
            slot = None
        if (
            slot is not None
            and slot.thread.alone is slot
            and slot.block is self
            and slot.words[slot.deadline_at]
            and not _Asyncio.running_loop()
        ):
            return SlotTimer(slot, slot.words[slot.entry_at])
        opened = getattr(self, "_opened", ())
        found = open_timer(self, _local.all_slots(), opened)
        if found is not None:
            return found
        road = find_road(getattr(self, "_asked", NOTHING_ASKED).client)[1]
        if road is not None and getattr(road, "address", None) == OFF:
            return UNWATCHED
        raise not_open()

    def _again(self) -> Expiration:
        """Return another object for the same block, which nobody has entered yet."""
        block = Expiration()
        block._after = self._after
        block._slot = _FRESH
        key = self._key
        block._key = key.key if isinstance(key, ByHand) else key
        for name in ("_asked", "_code"):
            if hasattr(self, name):
                setattr(block, name, getattr(self, name))
        return block

    def _begin(self, slot: Slot | Block | _NoChoice) -> Slot:
        """Go on off the quiet path: not alone in the thread, or the choice stands elsewhere."""
        if isinstance(slot, _NoChoice):
            slot = self._chosen_here()
            if isinstance(slot, _NoChoice):
                return self._enter_by_hand()
        armed = slot.nest(self)
        if isinstance(slot, Slot):
            if slot is VOID_SLOT:
                self._open(UNWATCHED)
            return armed
        try:
            # Not before: until it is armed, another thread would take it for one that has ended.
            self._open(slot.timer)
        except BaseException:
            slot.exit(None, None, None)
            raise
        return armed

    def _open(self, timer: Timer) -> None:
        """Note a timer that no slot of ours leads to."""
        with _shared:
            opened = getattr(self, "_opened", [])
            alive = [(who, one) for who, one in opened if one.remaining() is not None]
            self._opened = [*alive, (holder(), timer)]

    def _chosen_here(self) -> Slot | Block | _NoChoice:
        """Find what this thread's look at ``__exit__`` chose, if there was one before."""
        block, road = _local.road
        if block is self:
            _local.road = None, _USED
            if isinstance(road, Slot):
                road.block = self
            return road
        for slot in _local.all_slots():
            # Chosen on the quiet path, before another thread looked at this object, too.
            if slot.block is self and slot.entry != slot.words[slot.entry_at]:
                return slot
        return _USED

    def _unheld_slot(self) -> Slot | None:
        """Find a slot that this object armed and that no `with` statement will disarm.

        That is so if somebody looked at __exit__ without using it, and then entered by hand.
        """
        for slot in _local.all_slots():
            if slot.block is self and slot.words[slot.deadline_at] and not slot.is_held():
                return slot
        return None

    def _choose(self, key: Hashable) -> Slot | Block:
        """Check what the caller gave, and choose where the block's timer will stand."""
        limit = checked_limit(self._after)
        asked = getattr(self, "_asked", NOTHING_ASKED)
        name = key[-1] if isinstance(key, tuple) else key
        scope = scope_of(name, getattr(self, "_code", None), asked)
        client, road = find_road(asked.client)
        if road is None:
            if asked.is_more_than_a_client:
                raise cannot(client, "pause, nor take on_expiry, grace or signal")
            return ContractBlock(client, scope.name, limit)
        if (
            scope.policy.on_expiry is OnExpiry.RAISE
            and threading.current_thread() is not threading.main_thread()
        ):
            raise UnsupportedError(
                "on_expiry='raise' can only end a block of the main thread, where Python runs "
                "signal handlers: leave it out in other threads"
            )
        claimed = road.choose(key, self._after, limit, scope)
        if isinstance(claimed, Slot) and claimed is not VOID_SLOT:
            if len(_local.slots) >= _MOST_CACHED:
                _local.slots.clear()
            _local.slots[key] = claimed
        return claimed

    def _enter_by_hand(self) -> Slot:
        key = self._key
        chosen = self._choose(key.key if isinstance(key, ByHand) else key)
        with _shared:
            by_hand = self._key
            if not isinstance(by_hand, ByHand):
                by_hand = ByHand(by_hand)
            note = by_hand.note(chosen.exit)
            self._key = by_hand
        begun = isinstance(chosen, Slot)
        try:
            if isinstance(chosen, Slot):
                # It does not know us: it would keep us alive, and with us its own exit.
                chosen.block = None
            chosen.nest(self).arm()
            begun = True
            # Not before: until it is armed, another thread would take it for one that has ended.
            timer = SlotTimer(chosen, chosen.entry) if isinstance(chosen, Slot) else chosen.timer
            self._open(timer)
        except BaseException:
            if begun:
                chosen.exit(None, None, None)
            with _shared:
                by_hand.forget(note)
            raise
        return VOID_SLOT

    def _leave(self, *exc_info: object) -> None:
        unheld = self._unheld_slot()
        if unheld is not None:
            unheld.exit(*exc_info)
            return
        with _shared:
            by_hand = self._key
            if not isinstance(by_hand, ByHand):
                raise not_entered()
            end = by_hand.take()
            if not by_hand.exits:
                self._key = by_hand.key
        end(*exc_info)


def expires(
    after: float,
    scope: str | None = None,
    client: ContractClient | None = None,
    on_expiry: str | None = None,
    grace: float | None = None,
    signal: int | None = None,
) -> Expiration:
    """Declare that a block, a function or a generator's step takes at most `after` seconds.

    A worker whose block overruns is ended by the watcher, another process, even if the
    block hangs in C with the GIL held. Blocks are independent of each other: nested,
    recursive, in many threads, and in many asyncio tasks.

    Args:
        after: seconds from entering the block, more than 0.
        scope: the block's name in reports; ``<file>#<line>`` of the caller by default.
        client: who acquires the timer, if not the one that `configure` set or the
            environment's ``HANGWATCH_ADDRESS`` names.
        on_expiry: what an overrun leads to, if not what the watcher says: ``"report"``, a
            report alone; ``"raise"``, `TimerExpired` within the block, and the worker's end if
            it does not leave the block in time; ``"reap"``, the worker's end.
        grace: seconds that the worker has after each step before SIGKILL, 0 or more.
        signal: number of the signal that is sent first.

    Returns:
        The context manager, and decorator. What is wrong with the arguments it says on entering:

    Raises:
        ValueError: `after` is not positive and finite, `scope` is empty, or one of the rest
            is none of what it may be.
        TypeError: `after` is no number, `scope` no string, `client` no client.
        NotConfiguredError: nobody said who watches.
        UnsupportedError: ``"raise"`` outside of the main thread, or in an asyncio task; a
            client that knows no more than to acquire and release.
    """
    # A function, not the class itself: CPython makes a dict of the keyword arguments of a
    # class that is called (docs/decisions/0005-expires-is-a-function.md). None of these is
    # keyword-only: filling such a default in costs a look-up each.
    block = Expiration()
    block._after = after
    block._slot = _FRESH
    if scope is None:
        frame = _getframe(1)
        block._code = code = frame.f_code
        # The address of the instruction: since 3.11 a code object holds its bytecode.
        block._key = id(code) + frame.f_lasti
    else:
        block._key = scope
    if client is not None or on_expiry is not None or grace is not None or signal is not None:
        block._asked = asked = Asked(client, on_expiry, grace, signal)
        block._key = *asked.key, block._key
    return block


# A thread's look-up table is only a cache; scopes that never come again must not fill it.
_MOST_CACHED = 256
