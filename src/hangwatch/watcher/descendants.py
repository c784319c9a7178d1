"""The processes below a worker, found at the moment of the kill, and their end."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Set
from dataclasses import dataclass
from time import monotonic

from hangwatch.process import Identity, may_signal, read_stat
from hangwatch.watcher.fair_clock import FairClock

Doomed = tuple[int, int]
"""A process that dies with a worker: its pid, and its start in ticks since boot."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What a step of the ladder was about to do, for whoever finds the worker after it.

    Attributes:
        signal: which the step was to send; 0: it was to ask the worker to raise.
        doomed: who dies with the worker.
        until: if it still lives then, it has survived (CLOCK_MONOTONIC).
        reporter: who waits for its death, or for the block's end, to report it, should the
            watcher have died.
        block: index and entry of the slot of the block that it is about; None: of no block.
    """

    signal: int
    doomed: tuple[Doomed, ...]
    until: float
    reporter: Doomed | None
    block: tuple[int, float] | None


_MOST_DOOMED = 256
_DEAD_WITHIN = 1.0

# With many incidents at once, one look at all processes serves those of a moment.
_SNAPSHOT_LASTS = 0.05
_Snapshot = tuple[dict[int, list[int]], dict[int, int]]
_latest: list[tuple[float, _Snapshot]] = []


def _snapshot() -> _Snapshot:
    """Return every process's children, and every process's start."""
    if _latest and monotonic() - _latest[0][0] < _SNAPSHOT_LASTS:
        return _latest[0][1]
    children = defaultdict(list)
    starts = {}
    try:
        names = os.listdir("/proc")
    except OSError:  # no /proc, or no descriptor left: the worker goes without them
        names = []
    for name in names:
        if name.isdigit():
            stat = read_stat(int(name))
            if stat is not None:
                children[stat.ppid].append(stat.pid)
                starts[stat.pid] = stat.start_ticks
    _latest[:] = [(monotonic(), (children, starts))]
    return children, starts


def descendants_of(pid: int, spare: Set[int], start_ticks: int | None = None) -> list[Identity]:
    """Hold every descendant of `pid` by a pidfd.

    Args:
        pid: the worker.
        spare: processes that are left alone, with all that is below them: watched workers
            and our own processes.
        start_ticks: when the worker was started; its number may be another's by now.

    Returns:
        The descendants, parents first, up to a number; their pidfds are the caller's to close.

    Source: proc(5). The ppids of /proc/pid/stat, since /proc/pid/task/tid/children is
    not on every kernel. Reading stat takes no lock that a stuck process could hold.
    """
    children, starts = _snapshot()
    found: list[Identity] = []
    below = [pid] if start_ticks in (None, starts.get(pid)) else []
    # The look takes a while: of two numbers that were given anew each can seem the other's child.
    seen = {pid, *spare}
    for parent in below:
        for child in children[parent]:
            if child not in seen and len(found) < _MOST_DOOMED:
                seen.add(child)
                below.append(child)
                held = _hold(child, starts[child])
                if held is not None:
                    found.append(held)
    return found


class Tree:
    """The descendants of one worker, held from when they were found until they are dead."""

    def __init__(self) -> None:
        self._held: dict[int, Identity] = {}

    def hold(self, doomed: Iterable[Doomed]) -> None:
        """Hold those whom a watcher that died had found."""
        for pid, start_ticks in doomed:
            held = _hold(pid, start_ticks)
            if held is not None:
                self._held[pid] = held

    def look(self, worker: Identity, spare: Set[int]) -> list[Doomed]:
        """Find those that there are now; return all that were found so far, up to a number."""
        for found in descendants_of(worker.pid, spare, worker.start_ticks):
            known = self._held.get(found.pid)
            if known is not None and known.start_ticks == found.start_ticks:
                os.close(found.pidfd)
                continue
            if known is not None:  # its number is another's by now
                os.close(known.pidfd)
            self._held[found.pid] = found
        return [(held.pid, held.start_ticks) for held in self._held.values()][:_MOST_DOOMED]

    def end(
        self, uid: int, spare: Set[int], clock: FairClock, note: Callable[[str, str], None]
    ) -> Generator[float, None, None]:
        """Kill them, and wait until they are dead.

        Args:
            uid: the worker's user, who must be theirs.
            spare: processes that are left alone by now, with all that is below them.
            clock: what waits.
            note: told what was done about each.
        """
        spare = _with_those_below(self._held.keys() & spare)
        ending = [held for held in self._held.values() if held.pid not in spare]
        results = {held.pid: _kill(held, uid) for held in ending}
        sent = [held for held in ending if results[held.pid] == "sent"]
        yield from clock.wait(_DEAD_WITHIN, lambda: all(held.is_dead() for held in sent), 0.005)
        for held in ending:
            dead = "it is dead" if held.is_dead() else "it is not dead yet"
            note(f"SIGKILL to descendant {held.pid}", f"{results[held.pid]}; {dead}")

    def close(self) -> None:
        """Let go of them."""
        for held in self._held.values():
            os.close(held.pidfd)
        self._held = {}


def end_doomed(doomed: Collection[Doomed], uid: int, spare: Set[int]) -> list[int]:
    """Kill what was to die with a worker that is dead; return whom that hit."""
    hit = []
    spare = _with_those_below({pid for pid, _ in doomed} & spare)
    for pid, start_ticks in doomed:
        held = None if pid in spare else _hold(pid, start_ticks)
        if held is not None:
            if _kill(held, uid) == "sent":
                hit.append(pid)
            os.close(held.pidfd)
    return hit


def _with_those_below(pids: Iterable[int]) -> set[int]:
    """Return who is to be spared together with some that have become workers meanwhile."""
    below = list(pids)
    if below:
        children, _ = _snapshot()
        for pid in below:
            below.extend(child for child in children[pid] if child not in below)
    return set(below)


def _kill(held: Identity, uid: int) -> str:
    if not may_signal(uid, held.pid):
        return f"not sent: it is not user {uid}'s"
    return held.send(signal.SIGKILL)


def _hold(pid: int, start_ticks: int) -> Identity | None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    now = read_stat(pid)
    if now is None or now.start_ticks != start_ticks:
        os.close(pidfd)
        return None
    return Identity(pid, -1, start_ticks, pidfd)
