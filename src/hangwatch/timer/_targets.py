"""Which processes a request may end.

A queue or a FIFO does not say who wrote. So a request counts only for a live process of our own
user that descends from this one: not for us, our ancestors, or the watcher. A pidfd holds it
from its first request on, so no process that gets its number later is mistaken for it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Container
from time import monotonic

from hangwatch.process import Identity, read_stat
from hangwatch.timer._complaints import Complaints

_DEAD_WITHIN = 0.5
ESCALATE_AFTER = 5.0
"""Seconds that a worker has to end, or to leave its block, before SIGKILL follows."""


class RefusedError(Exception):
    """A request names a process that it may not speak for."""


class Targets:
    """The processes that have timers, each held by a pidfd.

    Args:
        spared: returns processes that, with all that descends from them, are no workers.
        complaints: where to say whom a request was refused for.
    """

    def __init__(self, spared: Callable[[], set[int]], complaints: Complaints) -> None:
        self._spared = spared
        self._complaints = complaints
        self._held: dict[int, Identity] = {}
        self._refused: set[int] = set()
        self._signalled: dict[int, float] = {}

    def note(self, pid: int) -> bool:
        """Hold the process that a request names, from its first request on.

        Returns:
            False if another process had this number before, whose timers are void now.
        """
        held = self._held.get(pid)
        if held is not None and not held.is_dead():
            return True
        was_refused = pid in self._refused
        self.forget(pid)
        self._hold(pid)
        # Who was refused had ended, perhaps, and now a worker has its number.
        is_another = held is not None or (was_refused and pid in self._held)
        return not is_another

    def is_gone(self, pid: int) -> bool:
        """Tell whether the process that was held under this number has ended."""
        held = self._held.get(pid)
        return held is not None and held.is_dead()

    def is_refused(self, pid: int) -> bool:
        """Tell whether a request named this number, and may not speak for it."""
        return pid in self._refused

    def reap(self, pid: int, number: int) -> bool:
        """Signal a process; call again until it is true.

        SIGKILL follows if another signal did not end it within `ESCALATE_AFTER` seconds.

        Returns:
            Whether it is dead, or nothing of ours to kill.
        """
        if pid not in self._held and pid not in self._refused:
            self._hold(pid)
        held = self._held.get(pid)
        if held is None:
            return True
        now = monotonic()
        since = self._signalled.setdefault(pid, now)
        if since == now:
            held.send(number)
        elif number == signal.SIGKILL or now - since >= ESCALATE_AFTER:
            held.send(signal.SIGKILL)
        return held.is_dead(_DEAD_WITHIN if number == signal.SIGKILL else 0.0)

    def forget(self, pid: int) -> None:
        """Let go of a process."""
        self._refused.discard(pid)
        self._signalled.pop(pid, None)
        held = self._held.pop(pid, None)
        if held is not None:
            os.close(held.pidfd)

    def forget_signals_but(self, overdue: Container[int]) -> None:
        """Note that all others got away: what they overrun next begins with its own signal."""
        for pid in [pid for pid in self._signalled if pid not in overdue]:
            del self._signalled[pid]

    def forget_refused_but(self, armed: Container[int]) -> None:
        """Forget who was refused and has no timers any more."""
        self._refused = {pid for pid in self._refused if pid in armed}

    def pids(self) -> list[int]:
        """Return who is held."""
        return list(self._held)

    def close(self) -> None:
        """Let go of everybody."""
        for pid in (*self._held, *self._refused):
            self.forget(pid)

    def _hold(self, pid: int) -> None:
        try:
            self._held[pid] = hold_descendant(pid, self._spared())
        except RefusedError as error:
            self._refused.add(pid)
            self._complaints.say(f"refused a timer that would end process {pid}: {error}")


def hold_descendant(pid: int, spared: set[int]) -> Identity:
    """Hold a process that descends from this one.

    Args:
        pid: its number, from wherever.
        spared: processes that, with all that descends from them, may not be held.

    Returns:
        Its identity; the caller closes the pidfd.

    Raises:
        RefusedError: it is no such process.
    """
    if pid <= 1:
        raise RefusedError("that is no process of a worker")
    if pid == os.getpid():
        raise RefusedError("that is the server's own")
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise RefusedError(f"it can't be held ({error})") from None
    try:
        uid = _effective_uid(pid)
        stat = read_stat(pid)
        if uid is None or stat is None:
            raise RefusedError("it has ended, or /proc does not show it")
        if uid != os.geteuid():
            raise RefusedError(f"it is of user {uid}, not {os.geteuid()}")
        _check_line(pid, spared)
        held = Identity(pid, uid, stat.start_ticks, pidfd)
        # What was read is of the process that we hold, if that still lives.
        if held.is_dead():
            raise RefusedError("it has ended")
    except BaseException:
        os.close(pidfd)
        raise
    return held


def _check_line(pid: int, spared: set[int]) -> None:
    """See that the line of parents leads to us."""
    seen = set()
    while pid != os.getpid():
        stat = read_stat(pid)
        if pid in spared:
            raise RefusedError("it belongs to the watcher")
        if stat is None or pid <= 1 or pid in seen:
            raise RefusedError(f"it does not descend from the server's process {os.getpid()}")
        seen.add(pid)
        pid = stat.ppid


def _effective_uid(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith("Uid:"):
                    return int(line.split()[2])
    except OSError:
        pass
    return None
