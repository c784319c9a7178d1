"""A worker's page, written: slots are given out, found again, taken back.

Nothing here takes a lock. It leans on one fact instead.

*Fact*: CPython with the GIL switches threads, runs signal handlers and delivers
asynchronous exceptions only when a function begins, a call of C code ends, or a
loop jumps back; never between two loads, stores, comparisons or forward jumps.
*Consequence*: a run of statements without a call and without a loop is atomic.
*Our choice*: what must be atomic is written as such a run and marked "no calls".
Held by tests/property/test_storm.py and tests/property/test_slots.py.

A free-threaded build has no such atomicity; there no slot is ever taken from
another thread.
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable

from hangwatch import linux
from hangwatch.page import layout as page
from hangwatch.page.view import View
from hangwatch.policy import Policy
from hangwatch.worker.own_descriptor import OwnDescriptor
from hangwatch.worker.pauses import Pauses
from hangwatch.worker.slots import TAKEN, VOID_SLOT, Scope, Slot, ThreadSlots

_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


class _ThreadEnd:
    """Lives in thread-local storage alone, so that it dies with the thread."""

    def __init__(self, writer: PageWriter, thread: ThreadSlots) -> None:
        self.writer = writer
        self.thread = thread
        self.pid = os.getpid()

    def __del__(self) -> None:
        # A forked child ends all threads but one before any hook of ours can run,
        # and the page is still its parent's then.
        if os.getpid() != self.pid:
            return
        for slot in self.thread.all_slots():
            # A block that somebody can still leave, a generator's, stays as it is.
            if slot.is_held():
                continue
            # No calls: another thread may have taken the place since.
            if slot.after is not TAKEN:
                slot.after = TAKEN
                slot.words[slot.deadline_at] = 0.0
                self.writer.freed.append(slot.index)


class _PerThread(threading.local):
    thread: ThreadSlots | None = None
    end: _ThreadEnd | None = None


class PageWriter:
    """The page of this process.

    Args:
        ring: called, from any thread, when the watcher must be told of a new deadline; returns
            whether it took the time of a handshake, too.
        on_full: called when no slot is left; that block then runs unwatched.

    Attributes:
        descriptor: the page's memfd, owned by this object.
        memory: the page's bytes.
        view: what the page says.
        pauses: what suspends its timers.

    Raises:
        OSError: no memory or no descriptor is left for a page.
    """

    def __init__(self, ring: Callable[[], bool], on_full: Callable[[], None]) -> None:
        self.descriptor = OwnDescriptor(page.create_memfd())
        self.memory = memoryview(mmap.mmap(self.descriptor.number, page.PAGE_BYTES))
        self.words = self.memory.cast("d")
        if not _GIL:
            # Counting them takes two steps, between which another thread could count, too.
            self.words[page.SLOTS_IN_USE] = page.CAPACITY
        self.freed: deque[int] = deque()
        self._address = linux.address_of(self.memory)
        self._ring = ring
        self._on_full = on_full
        self._next_index = itertools.count()
        self._slots: dict[int, Slot] = {}
        self._per_thread = _PerThread()
        self.view = View(self.memory)
        self.pauses = Pauses(self.view, self.words)

    def choose(self, key: Hashable, after: object, limit: float, scope: Scope) -> Slot:
        """Claim a slot of the calling thread that is not armed.

        Args:
            key: what tells this scope from the thread's others.
            after: the block's `after` as the caller gave it.
            limit: the same in seconds.
            scope: the block's name.

        Returns:
            The slot, its `entry` ahead of the page's: the caller arms it. It is a slot
            that nobody watches if the page is full.
        """
        thread = self._per_thread.thread
        if thread is None:
            thread = ThreadSlots(self.pauses)
            self._per_thread.thread = thread
            self._per_thread.end = _ThreadEnd(self, thread)
        slot = thread.slots.get(key)
        while True:
            if slot is not None and slot.after == after:
                # No calls: from the look to the claim, no other thread may take the slot.
                if slot.words[slot.deadline_at] == 0.0 and slot.after is not TAKEN:
                    slot.entry += 1.0
                    return slot
            slot = thread.unused()
            if slot is None or slot.key != key or slot.after != after:
                slot = self._move_in(thread, slot, key, after, limit, scope)
                if slot is None:
                    self._on_full()
                    return VOID_SLOT
            thread.keep(slot)

    def all_slots(self) -> list[Slot]:
        """Return the slots of all threads."""
        return [slot for slot in list(self._slots.values()) if slot.after is not TAKEN]

    def make_interruptible(self) -> None:
        """Let `TimerExpired` be raised in this thread, see `ThreadSlots`."""
        thread = self._per_thread.thread
        if thread is not None and not thread.interruptible:
            thread.interruptible = True
            # As what stands there was entered on the quiet path, its stack is not made yet.
            thread.stack_of(0)
            thread.alone = None

    def overdue_in_this_thread(self, now: float, raises: Callable[[Policy], bool]) -> list[Slot]:
        """Return this thread's overdue blocks that are in no asyncio task.

        Nothing is changed: this may run in a signal handler, in the middle of anything.

        Args:
            now: CLOCK_MONOTONIC in seconds.
            raises: tells by a block's policy whether its overrun raises; only such blocks,
                and only those that got no exception yet.
        """
        thread = self._per_thread.thread
        if thread is None:
            return []
        slots = {slot.index: slot for slot in thread.all_slots()}
        return [
            slot
            for armed in self.view.overdue(now)
            if (slot := slots.get(armed.index)) is not None
            and raises(slot.scope.policy)
            and slot.raised != (armed.entry, armed.deadline)
            and not self.view.is_in_task(armed)
        ]

    def make_private(self) -> None:
        """In a forked child: put private memory under every handle to the parent's page.

        The mapping itself is the one cell through which all handles reach the page.
        """
        linux.make_private(self._address, page.PAGE_BYTES)
        self.descriptor.close()

    def _move_in(
        self,
        thread: ThreadSlots,
        before: Slot | None,
        key: Hashable,
        after: object,
        limit: float,
        scope: Scope,
    ) -> Slot | None:
        """Give a scope the place that another of this thread had, or a free one."""
        slot = index = None
        try:
            # No calls: another thread may have taken the place since.
            if before is not None and before.after is not TAKEN:
                index = before.index
                before.after = TAKEN
            else:
                index = self._free_index()
                if index is None:
                    return None
            slot = Slot(thread, index, self.memory, self._ring, key, after, limit, scope)
            # The new generation goes first: who reads the rest in between sees it change.
            self.words[slot.entry_at] = slot.entry
            details = page.SlotDetails(
                limit=limit,
                ident=thread.ident,
                native_id=thread.native_id,
                thread_name=thread.name,
                scope=scope.name,
                policy=scope.policy,
                pauses=scope.pauses,
            )
            page.write_details(self.memory, index, details, keep_end=scope.is_place)
            self._slots[index] = slot
            # No calls: two threads may come here with neighbouring indices.
            if self.words[page.SLOTS_IN_USE] <= index:
                self.words[page.SLOTS_IN_USE] = index + 1.0
            return slot
        except BaseException:
            if slot is not None:
                # No calls: another thread may have taken the place already.
                if slot.after is TAKEN:
                    raise
                slot.after = TAKEN
            if index is not None:
                self.freed.append(index)
            raise

    def _free_index(self) -> int | None:
        try:
            return self.freed.pop()
        except IndexError:
            pass
        index = next(self._next_index)
        if index < page.CAPACITY:
            return index
        if _GIL:
            for slot in list(self._slots.values()):
                # No calls: an unarmed slot that no block has claimed changes hands.
                if (
                    slot.after is not TAKEN
                    and slot.words[slot.deadline_at] == 0.0
                    and slot.words[slot.entry_at] == slot.entry
                ):
                    slot.after = TAKEN
                    return slot.index
        return None
