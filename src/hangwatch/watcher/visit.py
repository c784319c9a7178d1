"""A visit: read a page once, say who is due and when to come again.

This is the watcher's half of the protocol. The worker's half is `Expiration.__enter__`:
store entry and deadline, then load watch_until, and ring unless
``now < watch_until <= deadline``. A model checker goes through both, step by step:
tests/model/protocol.pml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from hangwatch.failpoints import failpoint
from hangwatch.page.view import Armed
from hangwatch.watcher.page_reader import Overdue, PageReader


@dataclass(frozen=True, slots=True)
class Visit:
    """What one look at a page found.

    Attributes:
        due: armed slots whose deadline has passed, the longest overdue first. Blocks that
            are suspended by another are not due.
        inside: whether any block is open.
        entries: the entry counters, for the next visit to compare.
        again: when to look again (CLOCK_MONOTONIC); infinite: when the worker rings.
    """

    due: list[Armed]
    inside: bool
    entries: list[float]
    again: float


def visit(
    reader: PageReader,
    fence: Callable[[], bool],
    clock: Callable[[], float],
    before: list[float],
    judged: Mapping[Overdue, float],
) -> Visit:
    """Visit a page and leave a promise there.

    Args:
        reader: the page.
        fence: orders the store of 0 before the reads, on the worker's CPU too.
        clock: CLOCK_MONOTONIC in seconds.
        before: the entry counters of the visit before this one.
        judged: what is not due a second time, before the time that stands there.

    Returns:
        What was found. The worker stays quiet until `again` unless a new deadline
        comes before it.
    """
    reader.promise(0.0)
    failpoint("visit.opened")
    fence()
    entries = reader.entries()
    armed = reader.armed()
    failpoint("visit.read")
    now = clock()
    running = reader.running(armed)
    times = [(max(slot.deadline, judged.get(slot, 0.0)), slot) for slot in running]
    due = sorted((slot for when, slot in times if when <= now), key=lambda slot: slot.deadline)
    # The worker went on while we read: what was armed within a pause may have been found, and
    # the pause not. Whatever changed since the promise was taken back, the worker rings for.
    if due:
        still = set(reader.running(reader.armed()))
        due = [slot for slot in due if slot in still]
    again = min((when for when, _ in times if when > now), default=inf)
    # A slot in use that is unarmed just now will be armed again before long. Promising
    # its next possible deadline keeps blocks shorter than our response from ringing.
    busy = {slot.index for slot in armed}
    for index, entry in enumerate(entries):
        moved = index >= len(before) or entry != before[index]
        if moved and index not in busy:
            again = min(again, now + reader.limit(index))
    reader.promise(again)
    failpoint("visit.promised")
    return Visit(due, bool(armed), entries, again)
