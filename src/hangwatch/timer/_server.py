"""What the servers of the drop-in pairs have in common: a thread, and a companion watcher.

The thread takes requests from the queue or the FIFO, as the contract describes. Clients of ours
send none: they connect to the companion watcher, a process of its own.
"""

from __future__ import annotations

import abc
import os
import threading
import time
from math import inf, isfinite
from time import monotonic

from hangwatch.errors import LaunchError
from hangwatch.timer._complaints import Complaints
from hangwatch.timer._overrides import is_overridden
from hangwatch.timer._table import TimerTable
from hangwatch.timer.api import STOP_WITHIN, RequestQueue, TimerRequest, TimerServer

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

    from hangwatch.timer._companion import CompanionWatcher
    from hangwatch.watcher.events import Event

# How long a round waits at most, so that a stop is not waited for.
_LONGEST_WAIT = 0.25
_RETRY_AFTER = 0.05
_SHORTEST_WAIT = 0.001
# A watcher that is killed again and again takes its memory, or its CPU time, from others.
_REPLACE_AT_MOST_EVERY = 5.0


class DropInServer(TimerServer):
    """A server of a drop-in pair.

    Args:
        request_queue: where the requests of clients come from.
        max_interval: seconds that a round waits for a request at most.
        daemon: whether the thread lets the process end while it runs.
        report_dir: the watcher's report folder; None keeps no reports.
        complaints: where to say what is wrong with what others send.
    """

    def __init__(
        self,
        request_queue: RequestQueue,
        max_interval: float,
        daemon: bool,
        report_dir: str | os.PathLike[str] | None,
        complaints: Complaints,
    ) -> None:
        if not isinstance(max_interval, int | float) or not 0 <= max_interval < float("inf"):
            raise ValueError(
                f"max_interval must be a number of seconds, 0 or more, not {max_interval!r}"
            )
        from hangwatch.timer._targets import Targets  # takes long, and a worker needs none of it

        super().__init__(request_queue, max_interval, daemon)
        self._report_dir = report_dir
        self._table = TimerTable()
        self._complaints = complaints
        self._targets = Targets(self._spared, self._complaints)
        self._companion: CompanionWatcher | None = None
        # Reentrant: a signal handler may stop the server, too.
        self._changing = threading.RLock()
        self._replace_at = 0.0
        self._owner = os.getpid()
        self._joined = False
        self._last_progress = time.time()

    def __repr__(self) -> str:
        if self._watchdog_thread is None:
            return f"<{type(self).__name__}, not started>"
        companion = self._companion
        state = "no companion watcher" if companion is None else f"watcher {companion.pid}"
        return f"<{type(self).__name__}, {state}, {len(self._timers)} timers of requests>"

    @property
    def _timers(self) -> dict[tuple[int, str], Any]:
        """The timers of requests; what stands in shared memory is not among them."""
        return self._table.timers

    @abc.abstractmethod
    def _link(self) -> str | None:
        """Return the address file of this server's companion watcher; None: there can be none."""

    def _keeps_its_own_way(self) -> bool:
        """Tell whether somebody overrode a method that a companion watcher would bypass."""
        return is_overridden(
            self, "register_timers", "clear_timers", "get_expired_timers", "_reap_worker"
        )

    def _on_event(self, event: Event) -> None:
        """Take an event of the watcher; in a thread of its own."""
        if event["event"] == "alive":
            self._last_progress = event["at"]
            self._joined |= event["joined"] > 0

    def start(self) -> None:
        """Start watching; returns when workers can connect. A second start does nothing."""
        if self._watchdog_thread is not None:
            return
        self._owner = os.getpid()
        self._companion = self._launch_watcher()
        super().start()

    def stop(self) -> None:
        """Stop watching, within a second.

        The watcher finishes by itself what it has begun by then, a report for example. Without a
        start, or in a forked child of the program that started it, does nothing.
        """
        if self._owner != os.getpid():
            return
        until = monotonic() + STOP_WITHIN
        with self._changing:
            companion, self._companion = self._companion, None
            self._stopping.set()
        if companion is not None:
            companion.tell_to_stop()
        thread = self._watchdog_thread
        if companion is not None:
            companion.stop(until - STOP_WITHIN / 3)
        self._stop_watching(until - monotonic())
        if thread is None or not thread.is_alive():
            self._targets.close()

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Take in requests; what is none is dropped alone, with a warning."""
        for request in timer_requests:
            problem = _problem_with(request)
            if problem is not None:
                self._complaints.say(f"dropped a request: {problem}")
                continue
            self._joined = True
            if request.expiration_time >= 0 and not self._targets.note(request.worker_id):
                self._table.clear([request.worker_id])
            self._table.put(request)

    def clear_timers(self, worker_ids: set[int]) -> None:
        """Forget all timers of these workers, and of those that have ended."""
        gone = worker_ids | {pid for pid in self._targets.pids() if self._targets.is_gone(pid)}
        gone |= {pid for pid in self._table.pids() if self._is_gone(pid)}
        # The same ones: a timer of a process that nobody holds any more would end whoever gets
        # its number.
        self._table.clear(gone)
        for pid in gone:
            self._targets.forget(pid)
        self._targets.forget_refused_but(set(self._table.pids()))

    def get_expired_timers(self, deadline: float) -> dict[int, list[Any]]:
        """Return the timers that are due by `deadline` (epoch seconds), by process id."""
        expired = self._table.expired(deadline)
        refused = {pid for pid in expired if self._targets.is_refused(pid)}
        self._table.clear(refused)
        for pid in refused:
            self._targets.forget(pid)
            del expired[pid]
        self._targets.forget_signals_but(expired.keys())
        return expired

    def _is_gone(self, pid: int) -> bool:
        return self._targets.is_gone(pid)

    def _run_watchdog(self, *unused: object) -> None:
        longest = _RETRY_AFTER if self._table.has_overdue() else _LONGEST_WAIT
        self._go_round(max(min(self._max_interval, longest), _SHORTEST_WAIT))

    def _go_round(self, wait: float) -> None:
        self._look_after_watcher()
        # Before a verdict: the dead have nothing that could be overdue.
        self.clear_timers(set())
        try:
            self._take_requests(wait)
        finally:
            # A queue that fails ends nobody's protection.
            self._reap_overdue()
        if self._companion is None:
            self._last_progress = time.time()

    def _take_requests(self, wait: float) -> None:
        """Take requests for `wait` seconds, or until something is due."""
        queue = self._request_queue
        until = min(monotonic() + wait, self._table.next_due())
        requests: list[TimerRequest] = []
        try:
            while True:
                # In the end all that has come by then: who released in time is not overdue.
                waiting = queue.size()
                wait = max(until - monotonic(), 0.0)
                new = queue.get(max(1, waiting), wait)
                requests += new
                until = min(until, _first_due(new))
                if wait <= 0.0 or self._stopping.is_set():
                    break
        finally:
            self.register_timers(requests)

    def _launch_watcher(self) -> CompanionWatcher | None:
        """Launch the companion watcher, if there is to be one and it can be."""
        link = self._link()
        if link is None or self._keeps_its_own_way():
            return None
        from hangwatch.timer._companion import CompanionWatcher

        try:
            return CompanionWatcher(link, self._report_dir, self._on_event)
        except LaunchError as error:
            self._complaints.say(
                f"{error}; timers go through the queue or the FIFO alone, without stacks"
            )
            return None

    def _look_after_watcher(self) -> None:
        """See that clients find the watcher; replace one whose keeper was killed with it."""
        stopping = self._round.stopping
        if stopping is None or stopping.is_set():
            return
        with self._changing:
            companion = self._companion
            if companion is None or stopping.is_set():
                return
            if not companion.has_ended():
                companion.show()
                return
        now = monotonic()
        if now < self._replace_at:
            return
        self._replace_at = now + _REPLACE_AT_MOST_EVERY
        self._complaints.say(f"the watcher (process {companion.pid}) was killed and is replaced")
        companion.tell_to_stop()
        companion.stop(now)
        new = self._launch_watcher()
        with self._changing:
            if self._companion is companion and not stopping.is_set() and new is not None:
                self._companion, new = new, None
        if new is not None:  # a stop came meanwhile
            new.tell_to_stop()
            new.stop(monotonic())

    def _spared(self) -> set[int]:
        companion = self._companion
        return set() if companion is None else {companion.pid}


def _first_due(requests: list[TimerRequest]) -> float:
    """Return when the first of these is due (CLOCK_MONOTONIC)."""
    times = [one.expiration_time for one in requests if _problem_with(one) is None]
    first = min((when for when in times if when >= 0), default=inf)
    return monotonic() + first - time.time()


def _problem_with(request: Any) -> str | None:
    """Say why a request, from wherever, is none; None if it is one."""
    try:
        pid, scope_id = request.worker_id, request.scope_id
        expiration_time = request.expiration_time
    except AttributeError:
        return f"{type(request).__name__} is no TimerRequest"
    if not isinstance(pid, int) or isinstance(pid, bool):
        return f"its worker is not a process id: {pid!r:.40}"
    if not isinstance(scope_id, str):
        return f"its scope is no string: {scope_id!r:.40}"
    if not _is_finite(expiration_time):
        return f"its expiration time is no finite number: {expiration_time!r:.40}"
    return None


def _is_finite(number: Any) -> bool:
    try:
        return isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number)
    except OverflowError:  # an int that no float can hold
        return False
