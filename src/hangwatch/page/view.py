"""What a page says of its blocks: which are open, paused, overdue, in which others.

The one reading of a page, for its own worker and for the watcher. A worker may have written
anything there, also while it is read: no byte makes a method here raise, or run for long.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from hangwatch.page import layout
from hangwatch.policy import LAST_SIGNAL

_MOST_WITHIN = 32


class Armed:
    """A slot as one look found it: armed, as its `entry`, until `deadline` (CLOCK_MONOTONIC).

    Never changed. Not a dataclass: see `layout.SlotDetails`.
    """

    __slots__ = ("deadline", "entry", "index")

    def __init__(self, index: int, entry: float, deadline: float) -> None:
        self.index = index
        self.entry = entry
        self.deadline = deadline

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Armed):
            return NotImplemented
        # Tuples: what is no number is equal to itself there.
        mine = (self.index, self.entry, self.deadline)
        return mine == (other.index, other.entry, other.deadline)

    def __hash__(self) -> int:
        return hash((self.index, self.entry, self.deadline))

    def __repr__(self) -> str:
        return f"Armed({self.index}, {self.entry}, {self.deadline})"

    @property
    def block(self) -> tuple[int, float]:
        """What stays the same when the deadline moves."""
        return self.index, self.entry


class View:
    """A page, read.

    Its directory is read once: a page that changes it later is read as before.

    Args:
        memory: the whole page as bytes.

    Raises:
        PageError: it is of another layout, or malformed: its worker's fault.
    """

    def __init__(self, memory: memoryview) -> None:
        slots = layout.read_slots(memory)
        self.slots = slots.rows
        self._memory = memory
        # As far as any method reads; the area is aligned.
        self._words: memoryview[float] = memory[: slots.end].cast("d")
        self._offset = slots.offset
        self._first = slots.offset // 8

    # -- the header

    def debugger_is_loaded(self) -> bool:
        """Tell whether a Python debugger was loaded into the worker."""
        return self._words[layout.DEBUGGER_LOADED] != 0.0

    def raise_signal(self) -> int:
        """Return the signal that makes the main thread raise; 0: none."""
        number = self._words[layout.RAISE_SIGNAL]
        return int(number) if 0 < number <= LAST_SIGNAL else 0

    def in_use(self) -> int:
        """Return how many slots to look at: those that were ever given out."""
        in_use = self._words[layout.SLOTS_IN_USE]
        return int(in_use) if 0 <= in_use <= self.slots else self.slots

    # -- which blocks are open

    def entries(self) -> list[float]:
        """Return the entry counter of every slot in use."""
        words = self._words
        return [words[at + layout.ENTRY] for at in self._places()]

    def armed(self) -> list[Armed]:
        """Return every slot that is armed."""
        words = self._words
        found = []
        for index, at in enumerate(self._places()):
            # No calls between the two loads: in this process, another thread may arm it anew.
            deadline, entry = words[at + layout.DEADLINE], words[at + layout.ENTRY]
            if 0.0 < deadline < inf:  # nor does what is no number arm anything
                found.append(Armed(index, entry, deadline))
        return found

    def open_block(self, index: int, entry: float) -> Armed | None:
        """Return the block that armed a slot as `entry`, as it is now; None: it has ended."""
        at = self._word(index)
        words = self._words
        deadline, present_entry = words[at], words[at + layout.ENTRY]
        return Armed(index, entry, deadline) if deadline > 0.0 and present_entry == entry else None

    def is_unchanged(self, slot: Armed) -> bool:
        """Tell whether a block has not ended, and its deadline has not moved either."""
        at = self._word(slot.index)
        words = self._words
        return words[at] == slot.deadline and words[at + layout.ENTRY] == slot.entry

    # -- pauses

    def is_pause(self, index: int) -> bool:
        """Tell whether the block that armed a slot last is one that suspends the others."""
        return layout.pauses(self._memory, index, self._offset)

    def pauses(self, slot: Armed) -> bool:
        """Tell whether a block suspends the others of its page; one without an end does not."""
        return self.is_pause(slot.index) and slot.deadline < layout.NEVER

    def is_paused(self) -> bool:
        """Tell whether a block suspends the others."""
        words = self._words
        return any(
            0.0 < words[at] < layout.NEVER and self.is_pause(index)
            for index, at in enumerate(self._places())
        )

    # -- time

    def running(self, armed: list[Armed]) -> list[Armed]:
        """Return those whose time runs: while any of them pauses the page, only such."""
        return [slot for slot in armed if self.pauses(slot)] or armed

    def overdue(self, now: float) -> list[Armed]:
        """Return every block whose deadline has passed at `now` (CLOCK_MONOTONIC)."""
        return [slot for slot in self.running(self.armed()) if slot.deadline <= now]

    def limit(self, index: int) -> float:
        """Return the limit of a slot in seconds; infinite if what stands there is none."""
        limit = self._words[self._word(index) + layout.LIMIT]
        return limit if limit > 0 else inf

    def is_renewed(self, slot: Armed) -> bool:
        """Tell whether a block's deadline was ever moved by its holder."""
        return self._words[self._word(slot.index) + layout.RENEWED_ENTRY] == slot.entry

    def interval(self, slot: Armed) -> float:
        """Return the limit of a block's present interval in seconds, whatever number it is."""
        if self.is_renewed(slot):
            return self._words[self._word(slot.index) + layout.RENEWED_LIMIT]
        return self.limit(slot.index)

    def entered(self, slot: Armed) -> float:
        """Return when a block was entered (CLOCK_MONOTONIC), whatever number it is."""
        if self.is_renewed(slot):
            return self._words[self._word(slot.index) + layout.ENTERED]
        return slot.deadline - self.limit(slot.index)

    # -- more of one block

    def task(self, slot: Armed) -> float:
        """Return the identity of the task of an event loop that entered a block; 0.0: none."""
        return self._words[self._word(slot.index) + layout.TASK]

    def was_skipped(self, slot: Armed) -> bool:
        """Tell whether a block is open that the worker has passed by: see `core`."""
        return self._words[self._word(slot.index) + layout.SKIPPED_ENTRY] == slot.entry

    def was_raised(self, slot: Armed) -> bool:
        """Tell whether `TimerExpired` was raised in a block."""
        return self._words[self._word(slot.index) + layout.RAISED_ENTRY] == slot.entry

    def read_details(self, index: int) -> layout.SlotDetails:
        """Return what a slot says of the block that armed it last."""
        return layout.read_details(self._memory, index, self._offset)

    def details(self, slot: Armed) -> layout.SlotDetails | None:
        """Return what an armed slot says of its block; None if the block has ended."""
        details = self.read_details(slot.index)
        return details if self.is_unchanged(slot) else None

    def thread_names(self) -> dict[int, str]:
        """Return the names of the threads that have slots, by `threading.get_ident()`."""
        all_details = map(self.read_details, range(self.in_use()))
        # A slot that was given back has the name of a thread that may be gone.
        return {one.ident: one.thread_name for one in all_details if one.ident}

    # -- blocks in blocks

    def chain(self, slot: Armed) -> list[layout.SlotDetails]:
        """Return the details of a block and of the open blocks around it, innermost first."""
        entered = self.entered(slot)
        around = [
            other for other in self.others_of_its_thread(slot) if self.entered(other) <= entered
        ]
        around.sort(key=self.entered, reverse=True)
        return [self.read_details(one.index) for one in (slot, *around[:_MOST_WITHIN])]

    def within(self, slot: Armed) -> list[layout.SlotDetails]:
        """Return the details of the open blocks inside of a block, innermost first."""
        entered = self.entered(slot)
        inside = [
            other for other in self.others_of_its_thread(slot) if self.entered(other) > entered
        ]
        inside.sort(key=self.entered, reverse=True)
        return [self.read_details(one.index) for one in inside[-_MOST_WITHIN:]]

    def others_of_its_thread(self, slot: Armed) -> list[Armed]:
        """Return the other open blocks of a block's thread, and of its task if it is in one."""
        who = self._holder(slot)
        return [
            other
            for other in self.armed()
            if other.index != slot.index and self._holder(other) == who
        ]

    def _holder(self, slot: Armed) -> bytes:
        """Return what tells a thread and its task from others."""
        words = self._words
        at = self._word(slot.index)
        return bytes(words[at + layout.IDENT : at + layout.IDENT + 2]) + bytes(
            words[at + layout.TASK : at + layout.TASK + 1]
        )

    # -- places

    def _places(self) -> Iterator[int]:
        """Return the first word of every slot in use."""
        first = self._first
        return iter(range(first, first + self.in_use() * layout.SLOT_WORDS, layout.SLOT_WORDS))

    def _word(self, index: int) -> int:
        return self._first + index * layout.SLOT_WORDS
