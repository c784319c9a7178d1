"""The watching loop: one thread, one epoll, nothing in it that blocks.

It admits newcomers, visits each page when the page's promise is due or its worker
rings, and lets incidents take their course.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from math import inf
from time import monotonic

from hangwatch import linux
from hangwatch.errors import ProtocolError
from hangwatch.evidence.model import OtherWorker
from hangwatch.watch import admission
from hangwatch.watch.case import case_of, doing_of
from hangwatch.watch.helper import Helper
from hangwatch.watch.incident import Incident, Verdict
from hangwatch.watch.page_reader import Armed
from hangwatch.watch.settings import Settings
from hangwatch.watch.visit import visit
from hangwatch.watch.watched import Watched
from hangwatch.wire import encode_reply
from hangwatch.worker.connection import RING

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("hangwatch.watch")

# Without the fence a ring can be missed by a store buffer's width; looking at every page
# once a second bounds what that costs.
_SWEEP_EVERY = 1.0
_TICK = 1.0
# Being this late means that we, and perhaps the workers too, did not run: a frozen
# cgroup, a stopped job. Who is overdue by then gets a moment to leave its block.
_OVERSLEPT = 1.0
_LONGEST_SETTLING = 1.0
_MOST_RINGS_READ = 64
_INCIDENTS_AT_ONCE = 0.005
# What a turn of the loop costs besides the visit, roughly, in seconds of CPU.
_WAKING_COSTS = 30e-6


class Watcher:
    """Watches every worker that connects to `listener`.

    Args:
        listener: a listening SOCK_SEQPACKET socket; the watcher owns it from now on.
        settings: what to do about a block that overran.
        is_paused: tells whether watching is paused.
        on_tick: called about once a second from the loop; must not block.
    """

    def __init__(
        self,
        listener: socket.socket,
        settings: Settings,
        is_paused: Callable[[], bool] = lambda: False,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.paused = is_paused
        self._on_tick = on_tick
        self._listener = listener
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._newcomers: dict[int, admission.Newcomer] = {}
        self._workers: dict[int, Watched] = {}
        self._heap: list[tuple[float, int, Watched]] = []
        self._order = 0
        self._incidents: list[Incident] = []
        self._stopping = False
        self._fenced = linux.fence()
        self._awake_by = monotonic()
        self._paused_until = self._pause = 0.0
        self._next_tick = self._next_sweep = monotonic()
        listener.setblocking(False)
        self._add(listener.fileno(), self._accept)

    @property
    def workers(self) -> int:
        """How many workers are connected."""
        return len(self._workers)

    def watch_descriptor(self, descriptor: int, handler: Callable[[], None]) -> None:
        """Call `handler` from the loop whenever `descriptor` is readable."""
        self._add(descriptor, handler)

    def forget_descriptor(self, descriptor: int) -> None:
        """Undo `watch_descriptor`."""
        self._remove(descriptor)

    def stop(self) -> None:
        """End `run` once every incident's report is out."""
        self._stopping = True

    def run(self) -> None:
        """Watch until `stop`."""
        while not (self._stopping and all(incident.told for incident in self._incidents)):
            self._notice_pause()
            self._awake_by = max(self._next_wake(), monotonic())
            self._sleep(self._awake_by)
            self._notice_pause()
            for descriptor, _ in self._epoll.poll(0, 256):
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    self._guarded(handler)
            self._visit_due()
            self._resume_incidents()
            self._tick()

    def _guarded(self, step: Callable[[], None]) -> None:
        """Take a step; whatever is wrong with one worker must not end the watch of others."""
        try:
            step()
        except Exception:
            _log.exception("a step of the watcher failed")

    # -- waiting

    def _notice_pause(self) -> None:
        """Notice that we, and perhaps the workers too, did not run for a while."""
        now = monotonic()
        late = now - self._awake_by
        self._awake_by = now
        if late > _OVERSLEPT:
            self._paused_until, self._pause = now, late
            _log.warning("the watcher did not run for %.1f s; who is overdue may settle", late)

    def _add(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._epoll.register(descriptor, select.EPOLLIN)
        self._handlers[descriptor] = handler

    def _remove(self, descriptor: int) -> None:
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _next_wake(self) -> float:
        while self._heap and self._heap[0][0] != self._heap[0][2].next_visit:
            heapq.heappop(self._heap)
        times = [self._next_tick, *(incident.wake for incident in self._incidents)]
        if self._heap:
            times.append(self._heap[0][0])
        return min(times)

    def _sleep(self, until: float) -> None:
        # epoll_wait counts in milliseconds and wakes 0.6 ms late; select in microseconds.
        select.select([self._epoll], [], [], max(0.0, until - monotonic()))

    def _tick(self) -> None:
        now = monotonic()
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK
        self._on_tick()
        Helper.reap()
        if self._listener.fileno() not in self._handlers:
            self._add(self._listener.fileno(), self._accept)
        for newcomer in list(self._newcomers.values()):
            if newcomer.until < now:
                self._dismiss(newcomer, "no hello came in time")
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_EVERY
            for worker in list(self._workers.values()):
                if not (self._fenced and worker.hello.fenced):
                    self._visit(worker)

    # -- admitting

    def _accept(self) -> None:
        for _ in range(64):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    _log.warning("can't take a newcomer for now: %s", error.strerror)
                    self._remove(self._listener.fileno())
                return
            connection.setblocking(False)
            newcomer = admission.Newcomer(connection, monotonic() + admission.HELLO_WITHIN)
            self._newcomers[connection.fileno()] = newcomer
            self._add(connection.fileno(), lambda newcomer=newcomer: self._hear(newcomer))  # type: ignore[misc]

    def _hear(self, newcomer: admission.Newcomer) -> None:
        connection = newcomer.connection
        try:
            worker = admission.admit(connection, self.settings.allowed_uids)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as error:
            self._dismiss(newcomer, str(error))
            return
        self._remove(connection.fileno())
        del self._newcomers[connection.fileno()]
        self._workers[connection.fileno()] = worker
        self._add(connection.fileno(), lambda: self._rung(worker))
        self._add(worker.identity.pidfd, lambda: self._ended(worker))
        self._visit(worker)
        try:
            connection.send(encode_reply(None), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._drop(worker)

    def _dismiss(self, newcomer: admission.Newcomer, reason: str) -> None:
        _log.warning("refused a newcomer: %s", reason)
        descriptor = newcomer.connection.fileno()
        self._remove(descriptor)
        del self._newcomers[descriptor]
        admission.refuse(newcomer.connection, reason)

    def _drop(self, worker: Watched) -> None:
        """End the watch of a worker; an incident keeps its handles until it is over."""
        if worker.left:
            return
        worker.left = True
        worker.next_visit = inf
        del self._workers[worker.connection.fileno()]
        self._remove(worker.connection.fileno())
        self._remove(worker.identity.pidfd)
        if worker.busy:
            self._add(worker.identity.pidfd, lambda: self._died(worker))
            self._poke()
        else:
            worker.close()

    def _ended(self, worker: Watched) -> None:
        # The event may be an older descriptor's of the same number.
        if worker.identity.is_dead():
            self._drop(worker)

    def _died(self, worker: Watched) -> None:
        self._remove(worker.identity.pidfd)
        self._poke()

    # -- visiting

    def _rung(self, worker: Watched) -> None:
        began = time.thread_time()
        for _ in range(_MOST_RINGS_READ):
            try:
                ring = worker.connection.recv(len(RING) + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                ring = b""
            if not ring:
                self._drop(worker)
                return
        self._visit(worker)
        worker.budget.spend(time.thread_time() - began + _WAKING_COSTS)

    def _visit_due(self) -> None:
        now = monotonic()
        while self._heap and self._heap[0][0] <= now:
            when, _, worker = heapq.heappop(self._heap)
            if when == worker.next_visit and not worker.left:
                if worker.muted:
                    worker.muted = False
                    self._epoll.modify(worker.connection.fileno(), select.EPOLLIN)
                began = time.thread_time()
                self._visit(worker)
                worker.budget.spend(time.thread_time() - began + _WAKING_COSTS)

    def _visit(self, worker: Watched) -> None:
        now = monotonic()
        if not worker.budget.allows(now):
            # Not even its rings are heard until then.
            worker.muted = True
            self._epoll.modify(worker.connection.fileno(), 0)
            self._schedule(worker, now + worker.budget.again_after())
            return
        found = visit(worker.reader, linux.fence, monotonic, worker.entries, worker.judged)
        worker.entries = found.entries
        if found.due and not worker.busy:
            self._open_incident(worker, found.due[0])
        elif worker.judged and not found.due:
            worker.forget_ended()
        self._schedule(worker, found.again)

    def _schedule(self, worker: Watched, when: float) -> None:
        worker.next_visit = when
        if len(self._heap) > 64 + 4 * len(self._workers):
            self._heap = [entry for entry in self._heap if entry[0] == entry[2].next_visit]
            heapq.heapify(self._heap)
        if when != inf:
            self._order += 1
            heapq.heappush(self._heap, (when, self._order, worker))

    # -- incidents

    def _open_incident(self, worker: Watched, slot: Armed) -> None:
        at = monotonic()
        worker.judged.add((slot.index, slot.entry))
        case = case_of(worker, slot, at)
        if case is None:
            return
        self._notice_pause()
        settle = 0.0
        if slot.deadline <= self._paused_until:
            settle = min(self._pause, case.scope.limit_s, _LONGEST_SETTLING)
        verdict = Verdict(worker, slot, at, case, worker.reader.thread_names())
        incident = Incident(verdict, self, settle)
        self._incidents.append(incident)
        incident.resume()

    def _resume_incidents(self) -> None:
        now = monotonic()
        for incident in [one for one in self._incidents if one.wake <= now]:
            self._guarded(incident.resume)
            # Deadlines come first: the other incidents go on in the next turn.
            if monotonic() - now > _INCIDENTS_AT_ONCE:
                break
        for incident in [one for one in self._incidents if one.over]:
            self._incidents.remove(incident)
            worker = incident.verdict.worker
            if worker.left:
                self._remove(worker.identity.pidfd)
                worker.close()
            else:
                self._visit(worker)

    def _poke(self) -> None:
        """Let every incident look again."""
        for incident in self._incidents:
            incident.wake = 0.0

    # -- what incidents need: incident.Surroundings

    def look(self, worker: Watched, slot: Armed) -> bool:
        """Tell whether the block has still not ended."""
        linux.fence()
        return worker.reader.is_still(slot)

    def start_helper(self, work: Callable[[], bytes], keep: list[int]) -> Helper:
        """Run work in a process of its own."""
        helper = Helper(work, keep, before_close=self._remove)

        def read() -> None:
            helper.read()
            if helper.done:
                self._poke()

        self._add(helper.pipe, read)
        return helper

    def gathering(self) -> int:
        """Count the incidents whose evidence is being gathered."""
        return sum(incident.gathering for incident in self._incidents)

    def publishing(self) -> int:
        """Count the incidents whose report is being written."""
        return sum(incident.publishing for incident in self._incidents)

    def spared(self, worker: Watched) -> set[int]:
        """Return the processes that no kill of this worker may reach."""
        watched = {other.identity.pid for other in self._workers.values() if other is not worker}
        return watched | {os.getpid()}

    def others(self, worker: Watched) -> list[OtherWorker]:
        """Say what the other workers are doing."""
        return [doing_of(other) for other in self._workers.values() if other is not worker]


def stop_on_signals(watcher: Watcher) -> None:
    """End the watcher's `run` on `STOPPING_SIGNALS`."""
    read_end, write_end = socket.socketpair()
    read_end.setblocking(False)
    write_end.setblocking(False)
    signal.set_wakeup_fd(write_end.fileno())
    for number in STOPPING_SIGNALS:
        signal.signal(number, lambda *_: None)

    def stop() -> None:
        read_end.recv(64)
        if write_end.fileno() >= 0:  # kept open by this closure
            watcher.stop()

    watcher.watch_descriptor(read_end.fileno(), stop)
