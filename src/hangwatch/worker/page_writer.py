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
from functools import partial
from math import inf

from hangwatch import linux, page
from hangwatch.worker.own_descriptor import OwnDescriptor

# How many scopes a thread that is in none of them keeps slots for; the next one
# takes the slot that waited longest.
_KEPT_PER_THREAD = 16
_LOOKED_AT = 16
_TAKEN = object()


class Scope:
    """A block's name.

    Args:
        name: as reports show it.
        is_place: whether it is a file and line, whose end tells more than its beginning.
        keeps: what its key speaks of by identity, to be kept alive.
    """

    __slots__ = ("is_place", "keeps", "name")

    def __init__(self, name: str, is_place: bool = False, keeps: object = None) -> None:
        self.name = name
        self.is_place = is_place
        self.keeps = keeps


class Slot:
    """One scope's stay in one place of the page, and all that arming it needs at hand.

    Attributes:
        key: what tells the scope from the thread's others.
        after: the block's `after` as the caller gave it; `_TAKEN` once another scope, or
            another thread, has the place.
        limit: the same in seconds.
        keeps: what `key` speaks of by its identity, kept alive here.
        block: the Expiration that chose this slot last.
        entry: what the next arming will store. It is ahead of the page's from the
            moment a block chose this slot until it is armed.
        exit: disarms in one call of C code, so that nothing can interrupt it halfway.
        ring: tells the watcher; for when its promise does not cover a deadline.
        enclosing: the slot of the open block around this one, of entry `enclosing_entry`.
    """

    __slots__ = (
        "after",
        "block",
        "deadline_at",
        "enclosing",
        "enclosing_entry",
        "entry",
        "entry_at",
        "exit",
        "index",
        "keeps",
        "key",
        "limit",
        "memory",
        "ring",
        "thread",
        "words",
    )

    def __init__(
        self,
        thread: ThreadSlots,
        index: int,
        memory: memoryview,
        ring: Callable[[], None],
        key: Hashable,
        after: object,
        limit: float,
        keeps: object = None,
    ) -> None:
        self.thread = thread
        self.index = index
        self.memory = memory
        self.words = memory.cast("d")
        self.deadline_at = page.deadline_word(index)
        self.entry_at = self.deadline_at + page.ENTRY
        self.exit: Callable[..., None] = partial(
            page.DISARM.pack_into, memory, page.slot_byte(index), 0.0
        )
        self.ring = ring
        self.key = key
        self.after = after
        self.limit = limit
        self.keeps = keeps
        self.block: object = None
        self.entry = page.next_generation(self.words[self.entry_at])
        self.enclosing: Slot | None = None
        self.enclosing_entry = 0.0

    def is_open(self, entry: float) -> bool:
        """Tell whether the block that armed this slot as `entry` has not ended."""
        return self.words[self.deadline_at] != 0.0 and self.words[self.entry_at] == entry

    def is_watched(self, entry: float) -> bool:
        """Tell whether that block, and every block around it, has not ended.

        The watcher passes over a block whose enclosing block has ended: whatever an
        exception, or a generator that nobody finishes, left armed goes with it.
        """
        slot = self
        while slot.is_open(entry):
            if slot.enclosing is None:
                return True
            entry, slot = slot.enclosing_entry, slot.enclosing
        return False

    def is_held(self) -> bool:
        """Tell whether somebody besides this slot holds `exit`, and may yet call it.

        A `with` statement does while its block lasts, also in a generator that waits.
        """
        return sys.getrefcount(self.exit) > 2  # the attribute, and the argument of the call

    def nest(self, block: object) -> Slot:
        """Note which open block of this thread, or asyncio task, is around this one."""
        thread = self.thread
        task = current_task()
        stack = thread.stack_of(task)
        for depth, (slot, entry) in enumerate(stack):
            if not slot.is_open(entry):
                # What stands above was left behind inside of it.
                del stack[depth:]
                break
        outer, entry = stack[-1] if stack else (None, 0.0)
        if outer is not self.enclosing or entry != self.enclosing_entry:
            self.enclosing, self.enclosing_entry = outer, entry
            index = None if outer is None else outer.index
            page.write_enclosing(self.memory, self.index, index, entry)
        stack.append((self, self.entry))
        thread.alone = self if outer is None and task == 0 else None
        return self


class ThreadSlots:
    """The slots that one thread has in one page.

    Attributes:
        slots: the slot that serves a key next. Those serving the same key in blocks
            further out are in `others`.
        stacks: the blocks of each asyncio task (0: of none), outermost first, with
            their entries; those at the end may have ended.
        alone: the slot whose block was the only one of this thread when it was nested
            last. Arming it again needs no look at other blocks.
    """

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.native_id = threading.get_native_id()
        self.name = threading.current_thread().name
        self.slots: dict[Hashable, Slot] = {}
        self.others: deque[Slot] = deque()
        self.stacks: dict[int, list[tuple[Slot, float]]] = {}
        self.alone: Slot | None = None

    def all_slots(self) -> list[Slot]:
        """Return the slots that no other thread has taken."""
        return [slot for slot in (*self.slots.values(), *self.others) if slot.after is not _TAKEN]

    def stack_of(self, task: int) -> list[tuple[Slot, float]]:
        """Return the stack of open blocks of `task`, to be changed in place."""
        alone = self.alone
        if alone is not None:
            # It may have been armed again since, and nothing else was.
            self.stacks[0] = [(alone, alone.words[alone.entry_at])]
        stack = self.stacks.get(task)
        if stack is None:
            if len(self.stacks) >= self._prune_at:
                self.stacks = {
                    other: blocks
                    for other, blocks in self.stacks.items()
                    if any(slot.is_open(entry) for slot, entry in blocks)
                }
                self._prune_at = 64 + 2 * len(self.stacks)
            stack = self.stacks[task] = []
        return stack

    _prune_at = 64

    def unused(self, key: Hashable) -> Slot | None:
        """Take one of this thread's own slots that is not armed, or None.

        One that served `key` in a block further out comes first.
        """
        if len(self.others) >= self._sweep_at:
            self._disarm_left_behind()
        # A few at a time: with many blocks open, others come up at the next look.
        for _ in range(min(_LOOKED_AT, len(self.others))):
            slot = self.others.pop()
            if slot.words[slot.deadline_at] == 0.0 and slot.after is not _TAKEN:
                return slot
            if slot.after is not _TAKEN:
                self.others.appendleft(slot)
        if len(self.slots) < _KEPT_PER_THREAD:
            return None
        for kept, slot in list(self.slots.items()):
            if slot.words[slot.deadline_at] == 0.0:
                del self.slots[kept]
                return slot
        return None

    _sweep_at = 64

    def _disarm_left_behind(self) -> None:
        for slot in list(self.others):
            entry = slot.words[slot.entry_at]
            if slot.is_watched(entry) or slot.is_held():
                continue
            # No calls: the place may just have gone to another thread.
            if slot.after is not _TAKEN and slot.words[slot.entry_at] == entry:
                slot.words[slot.deadline_at] = 0.0
        self._sweep_at = 64 + 2 * len(self.others)

    def keep(self, slot: Slot) -> None:
        """Let `slot` serve its key from now on."""
        older = self.slots.pop(slot.key, slot)
        if older is not slot and older.after is not _TAKEN:
            self.others.append(older)
        self.slots[slot.key] = slot


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
            if not slot.is_held():
                slot.after = _TAKEN
                slot.words[slot.deadline_at] = 0.0
                self.writer.freed.append(slot.index)


class _PerThread(threading.local):
    thread: ThreadSlots | None = None
    end: _ThreadEnd | None = None


class PageWriter:
    """The page of this process.

    Args:
        ring: called, from any thread, when the watcher must be told of a new deadline.
        on_full: called when no slot is left; that block then runs unwatched.

    Attributes:
        descriptor: the page's memfd, owned by this object.
        memory: the page's bytes.

    Raises:
        OSError: no memory or no descriptor is left for a page.
    """

    def __init__(self, ring: Callable[[], None], on_full: Callable[[], None]) -> None:
        self.descriptor = OwnDescriptor(page.create_memfd())
        self.memory = memoryview(mmap.mmap(self.descriptor.number, page.PAGE_BYTES))
        self.words = self.memory.cast("d")
        self.freed: deque[int] = deque()
        self._address = linux.address_of(self.memory)
        self._ring = ring
        self._on_full = on_full
        self._next_index = itertools.count()
        self._slots: dict[int, Slot] = {}
        self._per_thread = _PerThread()

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
            thread = ThreadSlots()
            self._per_thread.thread = thread
            self._per_thread.end = _ThreadEnd(self, thread)
        slot = thread.slots.get(key)
        while True:
            if slot is not None and slot.after == after:
                # No calls: from the look to the claim, no other thread may take the slot.
                if slot.words[slot.deadline_at] == 0.0 and slot.after is not _TAKEN:
                    slot.entry += 1.0
                    return slot
            slot = thread.unused(key)
            if slot is None or slot.key != key or slot.after != after:
                slot = self._move_in(thread, slot, key, after, limit, scope)
                if slot is None:
                    self._on_full()
                    return VOID_SLOT
            thread.keep(slot)

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
            if before is not None and before.after is not _TAKEN:
                index = before.index
                before.after = _TAKEN
            else:
                index = self._free_index()
                if index is None:
                    return None
            slot = Slot(thread, index, self.memory, self._ring, key, after, limit, scope.keeps)
            # The new generation goes first: who reads the rest in between sees it change.
            self.words[slot.entry_at] = slot.entry
            details = page.SlotDetails(
                limit=limit,
                ident=thread.ident,
                native_id=thread.native_id,
                thread_name=thread.name,
                scope=scope.name,
            )
            page.write_details(self.memory, index, details, keep_end=scope.is_place)
            self._slots[index] = slot
            # No calls: two threads may come here with neighbouring indices.
            if self.words[page.SLOTS_IN_USE] <= index:
                self.words[page.SLOTS_IN_USE] = index + 1.0
            return slot
        except BaseException:
            if slot is not None:
                slot.after = _TAKEN
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
                    slot.after is not _TAKEN
                    and slot.words[slot.deadline_at] == 0.0
                    and slot.words[slot.entry_at] == slot.entry
                ):
                    slot.after = _TAKEN
                    return slot.index
        return None


_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


def _no_loop() -> None:
    return None


class Asyncio:
    """What asyncio's C code says of this thread, as soon as we have seen it imported.

    Attributes:
        running_loop: returns the loop that runs in this thread, or None.
    """

    running_loop: Callable[[], object] = staticmethod(_no_loop)
    seen = False


def current_task() -> int:
    """Return the identity of the asyncio task that runs in this thread; 0 outside of a loop."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return 0
    try:
        Asyncio.running_loop = staticmethod(asyncio.events._get_running_loop)
        Asyncio.seen = True
        return id(asyncio.current_task())
    except (RuntimeError, AttributeError):  # no loop runs here; half imported
        return 0


def void_slot(key: Hashable = None, after: object = _TAKEN, keeps: object = None) -> Slot:
    """Make a slot of the calling thread that nobody watches.

    Its limit is infinite and so is its memory's watch_until: arming it is always quiet.
    """
    memory = memoryview(bytearray(page.HEADER_BYTES + page.SLOT_BYTES))
    memory.cast("d")[page.WATCH_UNTIL] = inf
    thread = ThreadSlots()
    slot = thread.alone = Slot(thread, 0, memory, lambda: None, key, after, inf, keeps)
    thread.others.append(slot)
    return slot


VOID_SLOT = void_slot()
"""The slot of all blocks that have no place in the page."""
