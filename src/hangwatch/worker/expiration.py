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
from threading import get_ident
from time import monotonic
from types import CodeType

from hangwatch.errors import HangwatchError, NotConfiguredError
from hangwatch.page import WATCH_UNTIL
from hangwatch.worker.arguments import check_client, checked_limit, checked_scope, place
from hangwatch.worker.blocks import ContractBlock, NoThread
from hangwatch.worker.client import address_from_environment, client_at
from hangwatch.worker.slots import VOID_SLOT, Scope, Slot
from hangwatch.worker.tasks import Asyncio as _Asyncio
from hangwatch.worker.tasks import current_task

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

    from hangwatch.api import TimerClient
    from hangwatch.worker.blocks import Block, Road

_getframe = sys._getframe


class _Configured:
    """Who watches when a block names no client. One object, replaced field by field."""

    client: TimerClient | None = None
    by_environment = True


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


def forget_slots() -> None:
    """Make every thread look its slots up again: another client, or another process."""
    global _local
    _local = _PerThread()


os.register_at_fork(after_in_child=forget_slots)


def configure(timer_client: TimerClient | None) -> None:
    """Set the client of every block of this process that names none.

    Args:
        timer_client: the client; None unsets it, and `expires` then raises whatever
            the environment says.

    Raises:
        TypeError: it has no ``acquire`` and ``release``.
    """
    if timer_client is not None:
        check_client(timer_client)
    _Configured.client = timer_client
    _Configured.by_environment = False
    forget_slots()


class _ExitLookup(property):
    # ``with`` looks __exit__ up on the instance before it calls __enter__ (PEP 343), and
    # gets one C call that disarms the slot chosen at that moment. contextlib.ExitStack
    # takes it from the class and calls it with the instance.
    def __call__(self, block: Expiration, *exc_info: object) -> None:
        block._leave(*exc_info)


class _ByHand:
    """In the place of a key: blocks that were entered by a call of ``__enter__``.

    Until all of them are left, the next look at ``__exit__`` may mean to leave, not to enter.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.exits: list[tuple[int, int, Callable[..., None]]] = []


class Expiration:
    """A block's timer: what `expires` returns, to be used as a context manager.

    One object may be entered again and again, also while it is entered.
    """

    __slots__ = ("_after", "_client", "_code", "_key", "_slot")

    # Set by `expires`; an __init__ would cost as much as all the rest of it.
    _after: float
    _client: TimerClient
    _code: CodeType
    _key: Hashable
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
            slot.ring()
            # It may have been a handshake: the block's time begins now.
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
        if isinstance(key, _ByHand):
            return self._leave
        # Other threads may enter this object at the same time: the choice is this thread's.
        road = self._choose(key)
        _local.road = self, road
        self._slot = _USED
        return road.exit

    if TYPE_CHECKING:

        def __exit__(self, *exc_info: object) -> None: ...
    else:
        __exit__ = _ExitLookup(_look_up_exit)

    def _begin(self, slot: Slot | Block | _NoChoice) -> Slot:
        """Go on off the quiet path: not alone in the thread, or the choice stands elsewhere."""
        if isinstance(slot, _NoChoice):
            slot = self._chosen_here()
            if isinstance(slot, _NoChoice):
                return self._enter_by_hand()
        return slot.nest(self)

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
        client = getattr(self, "_client", None)
        name = key if client is None else key[1]  # type: ignore[index]
        code = getattr(self, "_code", None)
        if code is None:
            scope = Scope(checked_scope(name), False, client)
        else:
            scope = Scope(place(code, name), True, (code, client))
        if client is not None:
            check_client(client)
        elif _Configured.client is not None:
            client = _Configured.client
        if client is None:
            if not _Configured.by_environment:
                raise NotConfiguredError(
                    "configure(None) left no client: call configure(client), "
                    "or give expires(..., client=...)"
                )
            road: Road | None = client_at(address_from_environment())
        else:
            # Not of the instance: a mock has every attribute that it is asked for.
            find_road = getattr(type(client), "_road", None)
            road = None if find_road is None else find_road(client)
        if road is None:
            assert client is not None
            return ContractBlock(client, scope.name, limit)
        chosen = road.choose(key, self._after, limit, scope)
        if isinstance(chosen, Slot) and chosen is not VOID_SLOT:
            if len(_local.slots) >= _MOST_CACHED:
                _local.slots.clear()
            _local.slots[key] = chosen
        return chosen

    def _enter_by_hand(self) -> Slot:
        by_hand = self._key
        if not isinstance(by_hand, _ByHand):
            by_hand = _ByHand(by_hand)
        chosen = self._choose(by_hand.key)
        left = get_ident(), current_task(), chosen.exit
        by_hand.exits.append(left)
        self._key = by_hand
        try:
            chosen.nest(self).arm()
        except BaseException:
            by_hand.exits.remove(left)
            raise
        return VOID_SLOT

    def _leave(self, *exc_info: object) -> None:
        unheld = self._unheld_slot()
        if unheld is not None:
            unheld.exit(*exc_info)
            return
        by_hand = self._key
        if isinstance(by_hand, _ByHand):
            here = get_ident(), current_task()
            for left in reversed(by_hand.exits):
                if left[:2] == here:
                    by_hand.exits.remove(left)
                    if not by_hand.exits:
                        self._key = by_hand.key
                    left[2](*exc_info)
                    return
        raise HangwatchError(
            "this thread leaves a block that it has not entered: pair __exit__ with __enter__"
        )


def expires(
    after: float, scope: str | None = None, client: TimerClient | None = None
) -> Expiration:
    """Declare, in a ``with`` statement, that its block takes at most `after` seconds.

    A worker whose block overruns is ended by the watcher, another process, even if the
    block hangs in C with the GIL held. Blocks are independent of each other: nested,
    recursive, and in many threads.

    Args:
        after: seconds from entering the block, more than 0.
        scope: the block's name in reports; ``<file>#<line>`` of the caller by default.
        client: who acquires the timer, if not the one that `configure` set or the
            environment's ``HANGWATCH_ADDRESS`` names.

    Returns:
        The context manager. What is wrong with the arguments it says on entering:

    Raises:
        ValueError: `after` is not positive and finite, or `scope` is empty.
        TypeError: `after` is no number, `scope` no string, `client` no client.
        NotConfiguredError: nobody said who watches.
    """
    # A function, not the class itself: CPython makes a dict of the keyword arguments of a
    # class that is called (docs/decisions/0005-expires-is-a-function.md).
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
    if client is not None:
        block._client = client
        block._key = id(client), block._key
    return block


# A thread's look-up table is only a cache; scopes that never come again must not fill it.
_MOST_CACHED = 256
