"""A worker's page, mapped so that reading it is safe, and what a verdict is about."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from math import isfinite

from hangwatch.errors import PageError
from hangwatch.page import layout
from hangwatch.page.view import Armed, View
from hangwatch.policy import Policy

ENDED = "the block has ended"
PAUSED = "the process has paused its timers"


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


class PageReader(View):
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
            self._mapping = mmap.mmap(descriptor, status.st_size)
        except (OSError, ValueError) as error:
            raise PageError(f"the page can't be mapped ({error})") from None
        memory = memoryview(self._mapping)
        try:
            super().__init__(memory)
        except BaseException:
            memory.release()
            self._mapping.close()
            raise

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._memory.release()
        self._mapping.close()

    def promise(self, until: float) -> None:
        """Tell the worker when its page will be looked at next; 0 asks for every ring."""
        self._words[layout.WATCH_UNTIL] = until

    def change_of(self, found: Overdue) -> str | None:
        """Say what makes a verdict void; None if it still holds.

        That is: the block is open under the deadline that was seen; or there was no block, and
        still is none.
        """
        if isinstance(found, Standstill):
            if tuple(self.entries()) != found.entries or self.armed():
                return "it has entered a block"
            return None
        if self.open_block(found.index, found.entry) is None:
            return ENDED
        if not self.is_unchanged(found):
            return "the block has got more time"
        if not self.pauses(found) and self.is_paused():
            return PAUSED
        return None

    def is_still(self, found: Overdue) -> bool:
        """Tell whether a verdict still holds, see `change_of`."""
        return self.change_of(found) is None

    def lasts(self, found: Overdue) -> bool:
        """Tell whether what was judged may come up again: the block, or the standstill, lasts."""
        return self.is_still(found) if isinstance(found, Standstill) else self.is_unchanged(found)

    def policy(self, slot: Armed) -> Policy:
        """Return what a block chose about an overrun."""
        return self.read_details(slot.index).policy

    def spent(self, slot: Armed, at: float) -> Spent:
        """Return how long a block has taken by `at` (CLOCK_MONOTONIC)."""
        renewed = self.is_renewed(slot)
        limit = self.interval(slot)
        times = limit, at - self.entered(slot), at - (slot.deadline - limit)
        # Whatever the worker wrote there: reports show numbers.
        limit, inside, interval = (t if isfinite(t) else 0.0 for t in times)
        since = interval if renewed and slot.deadline < layout.NEVER else None
        return Spent(limit, inside, since)


def _check(descriptor: int, status: os.stat_result) -> None:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise PageError("the page is no memfd") from None
    if seals != layout.SEALS:
        raise PageError(
            f"the page has the seals {seals:#x} instead of "
            f"SHRINK, GROW and SEAL ({layout.SEALS:#x})"
        )
    # A hole in a page of huge pages kills its reader when none is left: SIGBUS.
    if status.st_blksize != mmap.PAGESIZE:
        raise PageError(f"the page is made of huge pages ({status.st_blksize} bytes)")
    if not layout.HEADER_BYTES <= status.st_size <= layout.MOST_BYTES:
        raise PageError(
            f"the page has {status.st_size} bytes instead of "
            f"{layout.HEADER_BYTES} to {layout.MOST_BYTES}"
        )
