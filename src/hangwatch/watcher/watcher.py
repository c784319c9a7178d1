"""The watching loop: one thread, one epoll, nothing in it that blocks.

It visits each page when the page's promise is due or its worker rings, and lets
incidents take their course. `Reception` lets newcomers in.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from math import inf
from time import monotonic

from hangwatch import linux
from hangwatch.agenda import Agenda
from hangwatch.evidence.model import OtherWorker
from hangwatch.evidence.report import overrun
from hangwatch.failpoints import failpoint
from hangwatch.handover import Kept
from hangwatch.page.view import Armed
from hangwatch.policy import NOTHING_CHOSEN
from hangwatch.watcher.case import case_of, doing_of
from hangwatch.watcher.descendants import Sentence, end_doomed
from hangwatch.watcher.events import Events
from hangwatch.watcher.fair_clock import FairClock
from hangwatch.watcher.helper import Helper
from hangwatch.watcher.identity import has_hung_up, read_out
from hangwatch.watcher.incident import Incident
from hangwatch.watcher.keeper_link import PING_EVERY, KeeperLink
from hangwatch.watcher.loop import READABLE, Loop, guarded
from hangwatch.watcher.news import coming_or_going, of_incident
from hangwatch.watcher.page_reader import Overdue
from hangwatch.watcher.reception import Reception
from hangwatch.watcher.reporter import RAISE
from hangwatch.watcher.settings import Settings
from hangwatch.watcher.takeover import HasLeft, state_of, take_over
from hangwatch.watcher.verdict import Verdict
from hangwatch.watcher.visit import visit
from hangwatch.watcher.watched import Watched
from hangwatch.wire import Reply, encode_reply
from hangwatch.worker.connection import RING

_log = logging.getLogger("hangwatch.watcher")

# Without the fence a ring can be missed by a store buffer's width; looking at every page
# once a second bounds what that costs.
_SWEEP_EVERY = 1.0
# Who stays outside of every block is found that part of the gap late, at most.
_GAP_LOOKS_EVERY = 0.1
_MOST_RINGS_READ = 64
# Beyond, what has ended is forgotten even if something is due at each visit.
_MANY_JUDGED = 1000
_INCIDENTS_AT_ONCE = 0.005
# What a turn of the loop costs besides the visit, roughly, in seconds of CPU.
_WAKING_COSTS = 30e-6


class Watcher:
    """Watches every worker that connects to `listener`.

    Args:
        listener: a listening SOCK_SEQPACKET socket.
        link: a connection to the keeper.
        settings: what to do about a block that overran.
        is_paused: tells whether watching is paused.
        events: where to tell what happens.
        successor: whether there was a watcher before it.
    """

    def __init__(
        self,
        listener: socket.socket,
        link: socket.socket,
        settings: Settings,
        is_paused: Callable[[], bool] = lambda: False,
        events: Events | None = None,
        successor: bool = False,
    ) -> None:
        self.settings = settings
        self._successor = successor
        self._events = events or Events(None)
        self._joined = 0
        self.paused = is_paused
        self.loop = Loop()
        self._keeper_pid = os.getppid()
        self.keeper = KeeperLink(link, self.loop, on_stop=self.stop, on_gone=self._keeper_died)
        self._reception = Reception(
            listener, self.loop, self.keeper, settings.allowed_uids, self._welcome
        )
        self._workers: dict[int, Watched] = {}
        self._leavers: set[Watched] = set()
        self._visits = Agenda()
        self._incidents: list[Incident] = []
        self._stopping = self._leaving = False
        self._fenced = linux.fence()
        self.clock = FairClock(self._say_that_we_paused)
        self._next_tick = self._next_sweep = monotonic()

    def take_over(self, kept: dict[int, Kept]) -> None:
        """Watch the workers of a watcher that has died; returns when every page was visited.

        It must be every page: tests/model/protocol.pml, SUCCESSOR_MISSES_A_PAGE.
        """
        gone: dict[int, HasLeft] = {}
        leavers: list[Watched] = []
        for number, entry in kept.items():
            try:
                worker = take_over(number, entry)
            except HasLeft as left:
                gone[number] = left
            except Exception:
                _log.exception("a worker could not be taken over: it runs on unwatched")
                self.keeper.drop(number)
            else:
                failpoint("handover.taken")
                if worker.left:
                    leavers.append(worker)
                    continue
                self._watch(worker)
                failpoint("handover.visited")
                if worker.welcomed:
                    self._joined += 1
                else:
                    self._answer(worker)
            self.keeper.ping(len(self._workers))
        # By now it is known who is a worker, and so to be spared.
        for worker in leavers:
            self._await_end(worker)
        for number, news in gone.items():
            if news.event is not None:
                self._events.tell(news.event)
            self._carry_out(news.sentence, news.uid)
            # Not before: until then a successor of ours needs it.
            self.keeper.drop(number)
        self._reception.next_number = max(kept, default=0) + 1
        if self._successor:
            workers = len(self._workers)
            self._events.tell({"event": "restarted", "at": time.time(), "workers": workers})

    def stop(self) -> None:
        """End `run` once every incident's report is out."""
        self._stopping = True

    def leave_when_alone(self) -> None:
        """End `run` once no worker is connected."""
        self._leaving = True

    def run(self) -> None:
        """Watch until `stop`."""
        self.keeper.ready(len(self._workers))
        failpoint("handover.ready")
        while not (self._stopping and all(incident.told for incident in self._incidents)):
            until = max(self._next_wake(), monotonic())
            self.clock.sleeps_until(until)
            self.loop.sleep(until)
            self.clock.notice()
            self.loop.dispatch()
            self._visit_due()
            self._resume_incidents()
            self._tick()
        self._reception.end()
        for worker in self._workers.values():
            # Nobody keeps what was promised: whoever arms shall ring, and find that out.
            worker.reader.promise(0.0)

    # -- waiting

    def _say_that_we_paused(self, late: float) -> None:
        """Say that we, and perhaps the workers too, did not run for a while."""
        _log.warning("the watcher did not run for %.1f s; overdue blocks get extra time", late)
        self._events.tell({"event": "stalled", "at": time.time(), "for_s": round(late, 3)})

    def _next_wake(self) -> float:
        wakes = (incident.wake for incident in self._incidents)
        return min(self._next_tick, self._visits.next(), *wakes)

    def _tick(self) -> None:
        now = monotonic()
        if now < self._next_tick:
            return
        self._next_tick = now + PING_EVERY
        self.keeper.ping(len(self._workers))
        self._events.send_waiting()
        self._events.tell({"event": "alive", "at": time.time(), "joined": self._joined}, True)
        self._lift_sentences(now)
        if self._leaving and not self._workers and not self._leavers:
            self.stop()
        Helper.reap()
        self._reception.tick(now)
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_EVERY
            for worker in list(self._workers.values()):
                if not (self._fenced and worker.hello.fenced):
                    self._visit(worker)

    def _keeper_died(self) -> None:
        _log.warning(
            "the keeper has died; this watcher, which nobody would replace, "
            "ends when its last worker has left"
        )
        self.leave_when_alone()

    # -- workers come and go

    def _welcome(self, worker: Watched) -> None:
        """Watch a newcomer that the keeper has taken, and tell it so."""
        self._watch(worker)
        failpoint("handshake.watched")
        self._answer(worker)

    def _watch(self, worker: Watched) -> None:
        self._workers[worker.connection.fileno()] = worker
        self.loop.add(worker.connection.fileno(), lambda: self._rung(worker))
        self.loop.add(worker.identity.pidfd, lambda: self._ended(worker))
        self._visit(worker)

    def _answer(self, worker: Watched) -> None:
        reply = encode_reply(Reply(None, self.settings.policy))
        try:
            worker.connection.send(reply, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._drop(worker)
        else:
            failpoint("handshake.answered")
            worker.welcomed = True
            self._joined += 1
            self.keep_in_mind(worker)
            failpoint("handshake.noted")
            self._events.tell(coming_or_going("joined", worker))

    def _drop(self, worker: Watched) -> None:
        """End the watch of a worker; an incident keeps its handles until it is over."""
        if worker.left:
            return
        worker.left = True
        self._visits.drop(worker)
        # Who has only hung up shall ring again, for somebody else.
        worker.reader.promise(0.0)
        if worker.welcomed:
            self._events.tell(coming_or_going("left", worker))
        del self._workers[worker.connection.fileno()]
        self.loop.remove(worker.connection.fileno())
        self.loop.remove(worker.identity.pidfd)
        self._await_end(worker)

    def _await_end(self, worker: Watched) -> None:
        """Let go of who has left, once no incident and no sentence is about it any more."""
        # It hangs up before it is dead.
        if worker.busy or (worker.sentence is not None and not worker.identity.is_dead()):
            self.keep_in_mind(worker)
            self._leavers.add(worker)
            self.loop.add(worker.identity.pidfd, lambda: self._died(worker))
            self._poke()
        else:
            self._let_go(worker)

    def _let_go(self, worker: Watched) -> None:
        self._leavers.discard(worker)
        if worker.identity.is_dead():
            self._carry_out(worker.sentence, worker.identity.uid)
        read_out(worker.connection)
        self.keeper.drop(worker.number)
        worker.close()

    def _carry_out(self, sentence: Sentence | None, uid: int) -> None:
        """End what was to be ended with a worker that is dead."""
        if sentence is not None:
            for pid in end_doomed(sentence.doomed, uid, self._spared()):
                _log.warning("killed process %d, which its worker had left behind", pid)
            failpoint("sentence.carried-out")

    def _lift_sentences(self, now: float) -> None:
        """Forget what a watcher that died was about to do to who has survived it."""
        for worker in [*self._workers.values(), *self._leavers]:
            sentence = worker.sentence
            if sentence is None or worker.busy or now < sentence.until:
                continue
            if not worker.identity.is_dead():
                worker.sentence = None
                self.keep_in_mind(worker)
            if worker in self._leavers:
                self.loop.remove(worker.identity.pidfd)
                self._let_go(worker)

    def _ended(self, worker: Watched) -> None:
        # The event may be an older descriptor's of the same number.
        if worker.identity.is_dead():
            self._drop(worker)

    def _died(self, worker: Watched) -> None:
        if not worker.identity.is_dead():
            return
        self.loop.remove(worker.identity.pidfd)
        self._poke()
        if not worker.busy:
            self._let_go(worker)

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
        for worker, _ in self._visits.take(monotonic()):
            began = time.thread_time()
            self._visit(worker)
            worker.budget.spend(time.thread_time() - began + _WAKING_COSTS)

    def _visit(self, worker: Watched) -> None:
        now = monotonic()
        if not worker.budget.allows(now):
            # Not even its rings are heard until then.
            worker.muted = True
            self.loop.listen_for(worker.connection.fileno(), 0)
            self._visits.put(worker, now + worker.budget.again_after())
            return
        if worker.muted:
            # Whoever visits: the promise that follows counts on rings.
            worker.muted = False
            self.loop.listen_for(worker.connection.fileno(), READABLE)
        found = visit(worker.reader, linux.fence, monotonic, worker.entries, worker.judged)
        moved, worker.entries = found.entries != worker.entries, found.entries
        due: list[Overdue] = [*found.due]
        again = found.again
        if self.settings.gap:
            # Looking costs the worker nothing: its page still promises `found.again`.
            again = min(again, now + self.settings.gap * _GAP_LOOKS_EVERY)
            standstill = worker.stands_still(now, moved, found.inside, self.settings.gap)
            if standstill is not None and worker.judged.get(standstill, 0.0) <= now:
                due.append(standstill)
        self._visits.put(worker, again)
        if worker.judged and (not due or len(worker.judged) > _MANY_JUDGED):
            worker.forget_ended()
        if due and not worker.busy:
            self._open_incident(worker, due[0])

    # -- incidents

    def _open_incident(self, worker: Watched, found: Overdue) -> None:
        if has_hung_up(worker.connection):
            # What it armed went with its program; what it rang before that is still to be read.
            self._drop(worker)
            return
        at = monotonic()
        case = case_of(worker, found, at)
        if case is None:
            # Its deadline may have moved, not ended: this visit has not seen the new one.
            self._visits.put(worker, at)
            return
        self._go_on_from(worker, found)
        told = found in worker.judged
        worker.judged[found] = inf
        settle = self.clock.settling(found.deadline, case.scope.limit_s)
        skipped = isinstance(found, Armed) and worker.reader.was_skipped(found)
        chosen = worker.reader.policy(found) if isinstance(found, Armed) else NOTHING_CHOSEN
        verdict = Verdict(
            *(worker, found, at, case),
            names=worker.reader.thread_names(),
            policy=self.settings.decide(chosen, worker.identity.pid, skipped),
            chosen=chosen,
            told=told,
        )
        if not told:
            self.tell("expired", verdict, overrun(case))
        incident = Incident(verdict, self, settle)
        # It begins in this turn of the loop, once every page that is due has been visited.
        worker.at_issue = found
        self._incidents.append(incident)

    def _go_on_from(self, worker: Watched, found: Overdue) -> None:
        """Take from a watcher that died what it had begun about a worker that is overdue."""
        sentence = worker.sentence
        if sentence is None:
            return
        if sentence.signal == RAISE and sentence.block != found.block:
            # It raised in another block, whose end its reporter tells.
            worker.sentence = None
        elif sentence.reporter is not None:
            # The story is ours to tell now.
            end_doomed([sentence.reporter], os.geteuid(), set())

    def _resume_incidents(self) -> None:
        now = monotonic()
        for incident in [one for one in self._incidents if one.wake <= now]:
            guarded(incident.resume)
            # Deadlines come first: the other incidents go on in the next turn.
            if monotonic() - now > _INCIDENTS_AT_ONCE:
                break
        for incident in [one for one in self._incidents if one.over]:
            self._incidents.remove(incident)
            worker = incident.verdict.worker
            if worker.left:
                self.loop.remove(worker.identity.pidfd)
                self._await_end(worker)
            else:
                worker.sentence = None
                # What a successor must not report, or take a step about, a second time.
                self.keep_in_mind(worker)
                self._visit(worker)

    def _poke(self) -> None:
        """Let every incident look again."""
        for incident in self._incidents:
            incident.wake = 0.0

    # -- what incidents need: verdict.Surroundings

    def look(self, worker: Watched, found: Overdue) -> str | None:
        """Say what makes a verdict void by now; None: it still holds."""
        linux.fence()
        return worker.reader.change_of(found)

    def start_helper(
        self, work: Callable[[], bytes], keep: list[int], outlives: bool = False
    ) -> Helper:
        """Run work in a process of its own, which may outlive us."""
        helper = Helper(work, keep, outlives, before_close=self.loop.remove)

        def read() -> None:
            helper.read()
            if helper.done:
                self._poke()

        self.loop.add(helper.pipe, read)
        return helper

    def gathering(self) -> int:
        """Count the incidents whose evidence is being gathered."""
        return sum(incident.gathering for incident in self._incidents)

    def publishing(self) -> int:
        """Count the incidents whose report is being written."""
        return sum(incident.publishing for incident in self._incidents)

    def tell(self, event: str, verdict: Verdict, headline: str) -> None:
        """Tell our launcher of an incident."""
        self._events.tell(of_incident(event, verdict, headline))

    def spared(self, worker: Watched) -> set[int]:
        """Return the processes that no kill of this worker may reach."""
        return self._spared(but=worker)

    def _spared(self, but: Watched | None = None) -> set[int]:
        watched = {other.identity.pid for other in self._workers.values() if other is not but}
        return watched | {self._keeper_pid, os.getpid(), self.settings.spared_pid}

    def keep_in_mind(self, worker: Watched) -> None:
        """Let a successor know what we know of a worker."""
        self.keeper.note(worker.number, state_of(worker))

    def others(self, worker: Watched) -> list[OtherWorker]:
        """Say what the other workers are doing."""
        return [doing_of(other) for other in self._workers.values() if other is not worker]
