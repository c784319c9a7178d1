"""A worker's slots, as the thread that uses them sees them."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from math import inf
from time import monotonic

from hangwatch.errors import UnsupportedError
from hangwatch.page import layout as page
from hangwatch.policy import NOTHING_CHOSEN, OnExpiry, Policy
from hangwatch.worker.tasks import Asyncio, current_task

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.pauses import Pauses

# How many scopes a thread that is in none of them keeps slots for; the next one
# takes the slot that waited longest.
_KEPT_PER_THREAD = 16
_LOOKED_AT = 16
TAKEN = object()
"""In the place of a slot's `after`, once its place is another's."""


class Scope:
    """A block's name, and what its caller chose about an overrun.

    Args:
        name: as reports show it.
        is_place: whether it is a file and line, whose end tells more than its beginning.
        keeps: what its key speaks of by identity, to be kept alive.
        policy: what the caller chose about an overrun.
        pauses: whether the block suspends the process's other timers.
    """

    __slots__ = ("independent", "is_place", "keeps", "name", "pauses", "policy")

    def __init__(
        self,
        name: str,
        is_place: bool = False,
        keeps: object = None,
        policy: Policy = NOTHING_CHOSEN,
        pauses: bool = False,
    ) -> None:
        self.name = name
        self.is_place = is_place
        self.keeps = keeps
        self.policy = policy
        self.pauses = pauses
        self.independent = True


class Slot:
    """One scope's stay in one place of the page, and all that arming it needs at hand.

    Attributes:
        key: what tells the scope from the thread's others.
        after: the block's `after` as the caller gave it; `TAKEN` once another scope, or
            another thread, has the place.
        limit: the same in seconds.
        scope: the block's name, and what `key` speaks of by its identity, kept alive here.
        block: the Expiration that chose this slot last.
        entry: what the next arming will store. It is ahead of the page's from the
            moment a block chose this slot until it is armed.
        exit: disarms in one call of C code, so that nothing can interrupt it halfway.
        ring: tells the watcher; for when its promise does not cover a deadline. It returns
            whether it took the time of a handshake, too.
        independent: whether other blocks of this scope, open in the same thread, are nothing to
            it; else one must be looked for, unless it is alone.
        enclosing: the slot of the open block around this one, of entry `enclosing_entry`.
        task: the asyncio task that entered it last, 0 outside of a loop.
        raised: entry and deadline for which `TimerExpired` was raised last.
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
        "independent",
        "index",
        "key",
        "limit",
        "memory",
        "raised",
        "ring",
        "scope",
        "task",
        "thread",
        "words",
    )

    def __init__(
        self,
        thread: ThreadSlots,
        index: int,
        memory: memoryview,
        ring: Callable[[], bool],
        key: Hashable,
        after: object,
        limit: float,
        scope: Scope,
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
        self.scope = scope
        self.independent = scope.independent
        self.block: object = None
        self.entry = page.next_generation(self.words[self.entry_at])
        self.enclosing: Slot | None = None
        self.enclosing_entry = 0.0
        self.task = 0
        self.raised = (0.0, 0.0)

    def is_open(self, entry: float) -> bool:
        """Tell whether the block that armed this slot as `entry` has not ended."""
        return self.words[self.deadline_at] != 0.0 and self.words[self.entry_at] == entry

    def is_watched(self, entry: float) -> bool:
        """Tell whether that block, and every block around it, has not ended.

        The watcher passes over a block whose enclosing block has ended: whatever an
        exception, or a generator that nobody finishes, left armed goes with it. A pause ends by
        its own end or its limit, though: while it lasts, others count on it.
        """
        slot = self
        while slot.is_open(entry):
            if slot.enclosing is None or slot.scope.pauses:
                return True
            entry, slot = slot.enclosing_entry, slot.enclosing
        return False

    def is_held(self) -> bool:
        """Tell whether somebody besides this slot holds `exit`, and may yet call it.

        A `with` statement does while its block lasts, also in a generator that waits.
        """
        return sys.getrefcount(self.exit) > 2  # the attribute, and the argument of the call

    def arm(self) -> None:
        """Arm, off the quiet path; if that raises, it isn't armed."""
        words = self.words
        try:
            words[self.entry_at] = self.entry
            words[self.deadline_at] = deadline = monotonic() + self.limit
            if self.ring():
                # It was a handshake, which is not the block's time.
                words[self.deadline_at] = monotonic() + self.limit
                if monotonic() >= deadline:
                    # The first deadline may have been found overdue, and the other one not yet.
                    self.ring()
        except BaseException:
            words[self.deadline_at] = 0.0
            raise

    def interval(self, entry: float) -> float:
        """Return the limit of that block's present interval in seconds."""
        words, at = self.words, self.deadline_at
        renewed = words[at + page.RENEWED_ENTRY] == entry
        limit: float = words[at + page.RENEWED_LIMIT] if renewed else self.limit
        return limit

    def entered(self, entry: float) -> float:
        """Return when that block was entered (CLOCK_MONOTONIC)."""
        words, at = self.words, self.deadline_at
        renewed = words[at + page.RENEWED_ENTRY] == entry
        when: float = words[at + page.ENTERED] if renewed else words[at] - self.limit
        return when

    def renew(self, entry: float, limit: float | None = None) -> bool:
        """Give the block that armed this slot as `entry` another interval from now.

        Args:
            entry: which block.
            limit: the interval in seconds; by default the block's limit.

        Returns:
            False if that block has ended.
        """
        now = monotonic()
        deadline = now + (self.limit if limit is None else limit)
        if not self._move(entry, deadline, deadline - now):
            return False
        if not now < self.words[page.WATCH_UNTIL] <= deadline:
            self.ring()
        return True

    def suspend(self, entry: float) -> bool:
        """Let that block go on without a deadline; return False if it has ended.

        It is not disarmed: a block in a block that has ended counts as ended, too.
        """
        return self._move(entry, page.NEVER, self.limit)

    def _move(self, entry: float, deadline: float, limit: float) -> bool:
        words, at = self.words, self.deadline_at
        # No calls: by another thread's hand, the block may end, or be renewed, meanwhile.
        if words[at] == 0.0 or words[at + page.ENTRY] != entry:
            return False
        if words[at + page.RENEWED_ENTRY] != entry:  # as `entered` has it
            words[at + page.ENTERED] = words[at] - self.limit
            words[at + page.RENEWED_ENTRY] = entry
        words[at + page.RENEWED_LIMIT] = limit
        words[at + page.RAISED_ENTRY] = 0.0
        words[at] = deadline
        return True

    def is_alone_in_scope(self) -> bool:
        """Tell whether no block of this scope is open in this thread, or task."""
        thread = self.thread
        return thread.alone is self or thread.innermost(self.scope.name) is None

    def nest(self, block: object) -> Slot:
        """Note which open block of this thread, or asyncio task, is around this one."""
        thread = self.thread
        self.task = task = current_task()
        if task and self.scope.policy.on_expiry is OnExpiry.RAISE:
            raise UnsupportedError(
                "on_expiry='raise' would interrupt whichever asyncio task runs at that moment: "
                "use asyncio.timeout within the task, and expires without 'raise' around it"
            )
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
        if task:
            self.words[self.deadline_at + page.TASK_ENTRY] = self.entry
        quiet = Asyncio.seen or not thread.interruptible
        thread.alone = self if outer is None and task == 0 and quiet else None
        return self


class ThreadSlots:
    """The slots that one thread has in one page.

    Args:
        pauses: what suspends the page's timers; None: nothing does.

    Attributes:
        slots: the slot that serves a key next. Those serving the same key in blocks
            further out are in `others`.
        stacks: the blocks of each asyncio task (0: of none), outermost first, with
            their entries; those at the end may have ended.
        alone: the slot whose block was the only one of this thread when it was nested
            last. Arming it again needs no look at other blocks.
        interruptible: whether `TimerExpired` may be raised in it. It must be known then of
            every block whether it is in an asyncio task, and until asyncio is seen to have been
            imported the quiet path does not look.
    """

    def __init__(self, pauses: Pauses | None = None) -> None:
        self.pauses = pauses
        self.ident = threading.get_ident()
        self.native_id = threading.get_native_id()
        self.name = threading.current_thread().name
        self.slots: dict[Hashable, Slot] = {}
        self.others: deque[Slot] = deque()
        self.stacks: dict[int, list[tuple[Slot, float]]] = {}
        self.alone: Slot | None = None
        self.interruptible = False

    def all_slots(self) -> list[Slot]:
        """Return the slots that no other thread has taken."""
        return [slot for slot in (*self.slots.values(), *self.others) if slot.after is not TAKEN]

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

    def innermost(self, name: str) -> Slot | None:
        """Return the slot of this thread's, or task's, innermost open block of that name.

        A pause is none of these: it replaces no block, and none replaces it.
        """
        for slot, entry in reversed(self.stack_of(current_task())):
            if slot.scope.name == name and slot.is_open(entry) and not slot.scope.pauses:
                return slot
        return None

    def unused(self) -> Slot | None:
        """Take one of this thread's own slots that is not armed, or None.

        Those of blocks that were further out come first, then the scope kept longest.
        """
        if len(self.others) >= self._sweep_at:
            self._disarm_left_behind()
        # A few at a time: with many blocks open, others come up at the next look.
        for _ in range(min(_LOOKED_AT, len(self.others))):
            slot = self.others.pop()
            if slot.words[slot.deadline_at] == 0.0 and slot.after is not TAKEN:
                return slot
            if slot.after is not TAKEN:
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
            if slot.after is not TAKEN and slot.words[slot.entry_at] == entry:
                slot.words[slot.deadline_at] = 0.0
        self._sweep_at = 64 + 2 * len(self.others)

    def keep(self, slot: Slot) -> None:
        """Let `slot` serve its key from now on."""
        older = self.slots.pop(slot.key, slot)
        if older is not slot and older.after is not TAKEN:
            self.others.append(older)
        self.slots[slot.key] = slot


def void_slot(
    key: Hashable = None,
    after: object = TAKEN,
    scope: Scope = Scope(""),  # noqa: B008
) -> Slot:
    """Make a slot of the calling thread that nobody watches.

    Its limit is infinite and so is its memory's watch_until: arming it is always quiet.
    """
    memory = memoryview(bytearray(page.HEADER_BYTES + page.SLOT_BYTES))
    memory.cast("d")[page.WATCH_UNTIL] = inf
    thread = ThreadSlots()
    slot = thread.alone = Slot(thread, 0, memory, lambda: False, key, after, inf, scope)
    thread.others.append(slot)
    return slot


VOID_SLOT = void_slot()
"""The slot of all blocks that have no place in the page."""
