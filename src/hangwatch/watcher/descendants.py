"""The processes below a worker, found at the moment of the kill."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Set
from time import monotonic

from hangwatch.process import Identity, read_stat

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


def descendants_of(pid: int, spare: Set[int]) -> list[Identity]:
    """Hold every descendant of `pid` by a pidfd.

    Args:
        pid: the worker.
        spare: processes that are left alone, with all that is below them: watched workers
            and our own processes.

    Returns:
        The descendants, parents first; their pidfds are the caller's to close.

    Source: proc(5). The ppids of /proc/pid/stat, since /proc/pid/task/tid/children is
    not on every kernel. Reading stat takes no lock that a stuck process could hold.
    """
    children, starts = _snapshot()
    found = []
    below = [pid]
    for parent in below:
        for child in children[parent]:
            if child not in spare:
                below.append(child)
                held = _hold(child, starts[child])
                if held is not None:
                    found.append(held)
    return found


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
