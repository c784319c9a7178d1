"""A worker's page, read: whatever the worker wrote there, reading it is safe."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from dataclasses import dataclass
from math import inf, isfinite

from hangwatch import page
from hangwatch.errors import PageError
from hangwatch.watcher.settings import OnExpiry, Wishes

_LAST_SIGNAL = int(signal.SIGRTMAX)
# A worker that asks for more is never ended by a watcher that is older than that.
LONGEST_GRACE = 86400.0
_MOST_WITHIN = 32
ENDED = "the block has ended"
PAUSED = "the process has paused its timers"


@dataclass(frozen=True, slots=True)
class Armed:
    """A slot as one look found it: armed, as its `entry`, until `deadline` (CLOCK_MONOTONIC)."""

    index: int
    entry: float
    deadline: float

    @property
    def block(self) -> tuple[int, float] | None:
        """What stays the same when the deadline moves."""
        return self.index, self.entry


@dataclass(frozen=True, slots=True)
class Standstill:
    """A worker outside of every block, since some time, for too long after `deadline`.

    Attributes:
        since: since when it has entered none (CLOCK_MONOTONIC).
        deadline: until when it might.
        entries: the entry counters, which have not moved since.
    """

    since: float
    deadline: float
    entries: tuple[float, ...]

    @property
    def block(self) -> tuple[int, float] | None:
        """None: it is of no block."""
        return None


Overdue = Armed | Standstill
"""What a verdict is about."""


@dataclass(frozen=True, slots=True)
class Spent:
    """How long a block may take, and has taken; seconds, suspended ones not counted.

    Attributes:
        limit: of its present interval.
        inside: since it was entered.
        since_renewal: since its present interval began; None: it was never renewed, or has
            no deadline.
    """

    limit: float
    inside: float
    since_renewal: float | None


class PageReader:
    """The watcher's mapping of a worker's page.

    Args:
        descriptor: the memfd that the worker sent; still the caller's afterwards.

    Attributes:
        inode: device and inode of the memfd, the page's identity.

    Raises:
        PageError: the memfd is not one that can be read safely: the worker's fault.
    """

    def __init__(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.inode = (status.st_dev, status.st_ino)
        _check(descriptor, status)
        try:
            mapping = mmap.mmap(descriptor, page.PAGE_BYTES)
        except (OSError, ValueError) as error:
            raise PageError(f"the page can't be mapped ({error})") from None
        self._mapping = mapping
        self._memory = memoryview(mapping)
        self._words = self._memory.cast("d")
        problem = page.header_problem(self._memory)
        if problem is not None:
            self.close()
            raise PageError(problem)

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._memory.release()
        self._mapping.close()

    def debugger_is_loaded(self) -> bool:
        """Tell whether a Python debugger was loaded into the worker."""
        return self._words[page.DEBUGGER_LOADED] != 0.0

    def promise(self, until: float) -> None:
        """Tell the worker when its page will be looked at next; 0 asks for every ring."""
        self._words[page.WATCH_UNTIL] = until

    def entries(self) -> list[float]:
        """Return the entry counter of every slot in use."""
        return [
            self._words[page.deadline_word(index) + page.ENTRY] for index in range(self._in_use())
        ]

    def limit(self, index: int) -> float:
        """Return the limit of a slot in seconds; infinite if what stands there is none."""
        limit: float = self._words[page.deadline_word(index) + page.LIMIT]
        return limit if limit > 0 else inf

    def armed(self) -> list[Armed]:
        """Return every slot that is armed and whose enclosing blocks have not ended."""
        words = self._words
        found = {}
        for index in range(self._in_use()):
            deadline = words[page.deadline_word(index)]
            if 0.0 < deadline < inf:  # nor does what is no number arm anything
                entry = words[page.deadline_word(index) + page.ENTRY]
                found[index] = Armed(index, entry, deadline)
        # A chain is walked once, however many blocks stand in it, even if it bites its tail.
        watched: dict[int, bool] = {}
        for index in found:
            path = []
            at: int | None = index
            well = True
            while at is not None and at not in watched:
                watched[at] = False  # what leads back to itself encloses nothing
                path.append(at)
                at, entry = self._enclosing(at)
                if at is not None and (at not in found or found[at].entry != entry):
                    well = False
                    break
            else:
                well = at is None or watched[at]
            watched.update(dict.fromkeys(path, well))
        return [slot for index, slot in found.items() if watched[index]]

    def pauses(self, slot: Armed) -> bool:
        """Tell whether a block suspends the others of its page; one without an end does not."""
        return page.pauses(self._memory, slot.index) and slot.deadline < page.NEVER

    def change_of(self, found: Overdue) -> str | None:
        """Say what makes a verdict void; None if it still holds.

        That is: the block is open under the deadline that was seen, and so is every block
        around it; or there was no block, and still is none.
        """
        if isinstance(found, Standstill):
            if tuple(self.entries()) != found.entries or self.armed():
                return "it has entered a block"
            return None
        if not self._is_open(found.index, found.entry) or not self._enclosed_well(found):
            return ENDED
        if not self._is_open(found.index, found.entry, found.deadline):
            return "the block has got more time"
        if not self.pauses(found) and self.is_paused():
            return PAUSED
        return None

    def is_open(self, found: Overdue) -> bool:
        """Tell whether what was judged may come up again: the block, or the standstill, lasts."""
        if isinstance(found, Standstill):
            return self.is_still(found)
        return self._is_open(found.index, found.entry, found.deadline)

    def is_still(self, found: Overdue) -> bool:
        """Tell whether a verdict still holds, see `change_of`."""
        return self.change_of(found) is None

    def is_paused(self) -> bool:
        """Tell whether a block suspends the others."""
        words, memory = self._words, self._memory
        # Rarely is there any; whether one still counts is asked of all blocks at once.
        if not any(
            page.pauses(memory, index) and words[page.deadline_word(index)] > 0.0
            for index in range(self._in_use())
        ):
            return False
        return any(self.pauses(slot) for slot in self.armed())

    def details(self, slot: Armed) -> page.SlotDetails | None:
        """Return what an armed slot says of its block; None if the block has ended."""
        details = page.read_details(self._memory, slot.index)
        return details if self._is_open(slot.index, slot.entry, slot.deadline) else None

    def wishes(self, slot: Armed) -> Wishes:
        """Return what a block asks for; what is none of what may be asked for is passed over."""
        details = page.read_details(self._memory, slot.index)
        known = details.signal == page.NEVER_KILL or 0 < details.signal <= _LAST_SIGNAL
        grace = details.grace if details.grace > 0 else 0.0
        return Wishes(
            None if details.on_expiry is None else OnExpiry(details.on_expiry),
            details.signal if known else 0,
            None if details.grace == 0.0 else min(grace, LONGEST_GRACE),
        )

    def spent(self, slot: Armed, at: float) -> Spent:
        """Return how long a block has taken by `at` (CLOCK_MONOTONIC)."""
        start = page.deadline_word(slot.index)
        limit = self.limit(slot.index)
        since = slot.deadline - limit
        entered, renewed = since, self._words[start + page.RENEWED_ENTRY] == slot.entry
        if renewed:
            limit, entered = (self._words[start + w] for w in (page.RENEWED_LIMIT, page.ENTERED))
            since = slot.deadline - limit
        times = limit, at - entered, at - since
        # Whatever the worker wrote there: reports show numbers.
        limit, inside, interval = (t if isfinite(t) else 0.0 for t in times)
        return Spent(limit, inside, interval if renewed and slot.deadline < page.NEVER else None)

    def raise_signal(self) -> int:
        """Return the signal that makes the main thread raise; 0: none."""
        number = self._words[page.RAISE_SIGNAL]
        return int(number) if 0 < number <= _LAST_SIGNAL else 0

    def is_in_task(self, slot: Armed) -> bool:
        """Tell whether a block is in an asyncio task."""
        at = page.deadline_word(slot.index)
        return bool(self._words[at + page.TASK_ENTRY] == slot.entry)

    def was_raised(self, slot: Armed) -> bool:
        """Tell whether `TimerExpired` was raised in a block."""
        at = page.deadline_word(slot.index)
        return bool(self._words[at + page.RAISED_ENTRY] == slot.entry)

    def chain(self, slot: Armed) -> list[page.SlotDetails]:
        """Return the details of a block and of the open blocks around it, innermost first."""
        found = []
        seen = set()
        index: int | None = slot.index
        while index is not None and index not in seen and index < page.CAPACITY:
            seen.add(index)
            found.append(page.read_details(self._memory, index))
            index, entry = page.read_enclosing(self._memory, index)
            if index is not None and not self._is_open(index, entry):
                break
        return found

    def within(self, slot: Armed) -> list[page.SlotDetails]:
        """Return the details of the open blocks inside of a block, innermost first."""
        inside_of: dict[int, list[int]] = {}
        for inner in self.armed():
            outer, _ = page.read_enclosing(self._memory, inner.index)
            if outer is not None:
                inside_of.setdefault(outer, []).append(inner.index)
        # Each slot leads to one other, so none is met twice, whatever stands in the page.
        found = [slot.index]
        for index in found:
            found += inside_of.pop(index, [])[: _MOST_WITHIN - len(found)]
        return [page.read_details(self._memory, index) for index in reversed(found[1:])]

    def thread_names(self) -> dict[int, str]:
        """Return the names of the threads that have slots, by `threading.get_ident()`."""
        all_details = (page.read_details(self._memory, i) for i in range(self._in_use()))
        return {details.ident: details.thread_name for details in all_details}

    def _enclosing(self, index: int) -> tuple[int | None, float]:
        """Return what a block ends with, see `Slot.is_watched`; a pause with nothing."""
        if page.pauses(self._memory, index):
            return None, 0.0
        return page.read_enclosing(self._memory, index)

    def _in_use(self) -> int:
        in_use = self._words[page.SLOTS_IN_USE]
        return int(in_use) if 0 <= in_use <= page.CAPACITY else page.CAPACITY

    def _is_open(self, index: int, entry: float, deadline: float | None = None) -> bool:
        at = page.deadline_word(index)
        now_set = self._words[at]
        right = now_set > 0.0 if deadline is None else now_set == deadline
        return bool(right and self._words[at + page.ENTRY] == entry)

    def _enclosed_well(self, slot: Armed) -> bool:
        index = slot.index
        for _ in range(page.CAPACITY):
            outer, entry = self._enclosing(index)
            if outer is None:
                return True
            if not self._is_open(outer, entry):
                return False
            index = outer
        return False


def _check(descriptor: int, status: os.stat_result) -> None:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise PageError("the page is no memfd") from None
    if seals != page.SEALS:
        raise PageError(
            f"the page has the seals {seals:#x} instead of SHRINK, GROW and SEAL ({page.SEALS:#x})"
        )
    # A hole in a page of huge pages kills its reader when none is left: SIGBUS.
    if status.st_blksize != mmap.PAGESIZE:
        raise PageError(f"the page is made of huge pages ({status.st_blksize} bytes)")
    if status.st_size != page.PAGE_BYTES:
        raise PageError(f"the page has {status.st_size} bytes instead of {page.PAGE_BYTES}")
