"""One incident, from the verdict to the report: settle, gather, act, confirm, publish.

The course is a generator: it yields the time at which it wants to go on, and the loop
resumes it then, or earlier if something happened. It looks at the world anew each time
and never waits by itself.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
from collections.abc import Generator
from dataclasses import replace
from math import inf
from time import monotonic

from hangwatch.evidence.gather import gather
from hangwatch.evidence.model import Action, Evidence, Outcome, Report
from hangwatch.evidence.report import facts, headline
from hangwatch.evidence.stacks import ANSWER_WITHIN, Asked
from hangwatch.failpoints import failpoint
from hangwatch.page.view import Armed
from hangwatch.policy import OnExpiry
from hangwatch.watcher.descendants import Doomed, Sentence, Tree
from hangwatch.watcher.error_file import ErrorFile
from hangwatch.watcher.page_reader import ENDED, PAUSED
from hangwatch.watcher.raising import SoftEnding
from hangwatch.watcher.reporter import BY_ANOTHER, RAISE, Reporter, name_of
from hangwatch.watcher.verdict import Surroundings, Verdict

_EVIDENCE_WITHIN = 2.0
# How many times as long evidence may take, and an answer of the worker's, where a debugger is
# loaded: on a busy machine, too, who is at a prompt must be seen to be, or dies of it.
_PATIENCE = 5
MOST_GATHERING = MOST_PUBLISHING = 4
_PUBLISH_WITHIN = 10.0
_DEAD_WITHIN = 5.0
_PAUSE_WITHIN = 1.0
_LONGEST_BACK_OFF = 60.0
# A worker under a debugger is looked at again so often, in seconds.
_DEBUGGED_LOOK_AGAIN = 2.0
# And one of whom an error of ours has kept us.
_FAILED_LOOK_AGAIN = 1.0

_SKIPPED = "its thread has left a block around it: it was skipped, not hung"

_log = logging.getLogger("hangwatch.watcher")

Course = Generator[float, None, None]


class Incident:
    """An incident under way.

    Args:
        verdict: what started it.
        around: the watcher.
        settle: seconds that the block gets before anything happens.

    Attributes:
        wake: when the course wants to go on at the latest (CLOCK_MONOTONIC).
        over: whether the course has come to its end.
        told: whether the report is out; only a process that can't be killed keeps the
            course going after that.
        gathering: whether evidence is being gathered.
        publishing: whether the report is being written.
    """

    def __init__(self, verdict: Verdict, around: Surroundings, settle: float) -> None:
        self.verdict = verdict
        self.wake = 0.0
        self.over = False
        self.told = False
        self.gathering = self.publishing = False
        self._around = around
        self._settle = settle
        self._evidence: bytes | None = None
        self._reporter: Reporter | None = None
        self._problems: list[str] = []
        self._actions: list[Action] = []
        # Whoever has died before us may have sent it a signal.
        sentence = verdict.worker.sentence
        self._signalled = sentence is not None and sentence.signal != RAISE
        self._debugger: str | None = None
        self._paused = False
        self._tree = Tree()
        self._course = self._run()

    def resume(self) -> None:
        """Go on until the next wait."""
        self.wake = inf
        try:
            self.wake = next(self._course)
        except StopIteration:
            self.over = self.told = True
        except BaseException:
            self.over = self.told = True
            self.verdict.worker.judge_again(self.verdict.found, monotonic() + _FAILED_LOOK_AGAIN)
            raise

    def _run(self) -> Course:
        worker = self.verdict.worker
        try:
            failpoint("incident.begun")
            yield from self._wait_to_settle()
            failpoint("incident.settled")
            if self._overdue():
                yield from self._gather()
            if self._is_spared_as_debugged():
                self.verdict.worker.judge_again(
                    self.verdict.found, monotonic() + _DEBUGGED_LOOK_AGAIN
                )
                if self.verdict.told:
                    return
                self._note("debugger", f"{self._debugger}; left alone while that lasts")
                outcome = Outcome.REPORTED
            else:
                outcome = yield from self._act()
                if outcome not in (Outcome.REAPED, Outcome.UNKILLABLE):
                    self._acquit()
                if self._paused:
                    # It is as overdue as before once the pause is over.
                    worker.judge_again(self.verdict.found, 0.0)
                    if self.verdict.told:
                        return
            self._around.tell(outcome.value, self.verdict, headline(self._report(outcome)))
            yield from self._tell(outcome)
            if outcome is Outcome.UNKILLABLE:
                yield from self._insist()
        finally:
            worker.at_issue = None
            if self._reporter is not None:
                self._reporter.hang_up()
            self._tree.close()

    def _wait_to_settle(self) -> Course:
        settle = self._settle
        while self._around.paused() and self._overdue():
            settle = min(self.verdict.case.scope.limit_s, 1.0)
            yield monotonic() + 0.1
        yield from self._around.clock.wait(settle, lambda: not self._overdue(), 0.02)

    def _wait_out_pause(self) -> Course:
        """Let a short pause pass; a long one's own overrun must not wait for us."""
        worker, found = self.verdict.worker, self.verdict.found
        yield from self._around.clock.wait(
            _PAUSE_WITHIN, lambda: self._around.look(worker, found) != PAUSED, 0.02
        )

    def _overdue(self) -> bool:
        worker, found = self.verdict.worker, self.verdict.found
        if worker.left or worker.identity.is_dead():
            return False
        return self._around.look(worker, found) is None

    def _asks_for_debuggers(self) -> bool:
        """Tell whether somebody who is under a debugger would have to be spared."""
        harmless = self.verdict.policy.on_expiry is OnExpiry.REPORT
        return not (harmless or self.verdict.policy.kill_debugged)

    def _is_about_to_be_killed(self) -> bool:
        policy = self.verdict.policy
        # Another signal may be one that the worker handles, and lives on.
        return policy.on_expiry is OnExpiry.REAP and policy.first_signal in (
            signal.SIGTERM,
            signal.SIGKILL,
        )

    def _why_unasked(self) -> str | None:
        """Say why the worker is not asked for its stacks; None: it is."""
        if not self.verdict.policy.stacks:
            return "the watcher was told not to ask"
        if not self._is_about_to_be_killed():
            return "only a worker that is about to be killed is asked: a request can disturb it"
        return None

    def _may_be_debugged(self) -> bool:
        """Tell whether stacks may show a debugger at work, which spares the worker."""
        return self._asks_for_debuggers() and self.verdict.worker.reader.debugger_is_loaded()

    def _assumed_debugger(self) -> str | None:
        """Name the debugger that may be at work in a worker that is not asked for its stacks."""
        if self._is_about_to_be_killed() or not self._may_be_debugged():
            return None
        return "bdb or pydevd is loaded, and may be at work"

    def _gather(self) -> Course:
        patience = _PATIENCE if self._may_be_debugged() else 1
        within = patience * _EVIDENCE_WITHIN
        # Where many hang at once somebody may be debugging one of them: it is worth a wait.
        is_our_turn = yield from self._around.clock.wait(
            within * (2 if self._asks_for_debuggers() else 1),
            lambda: self._around.gathering() < MOST_GATHERING,
        )
        if not is_our_turn:
            self._problems.append("evidence: too many incidents at once")
            return
        verdict, worker = self.verdict, self.verdict.worker
        asked = Asked(
            identity=worker.identity,
            channel=worker.hello.stacks,
            inode=worker.stacks_inode,
            ident=verdict.case.scope.thread.id,
            native_id=verdict.case.scope.thread.native_id,
            names=verdict.names,
            is_overdue=lambda: worker.reader.is_still(verdict.found),
            unasked=self._why_unasked(),
            debugger=self._assumed_debugger(),
            answer_within=patience * ANSWER_WITHIN,
        )
        try:
            helper = self._around.start_helper(
                lambda: _packed(gather(asked, self._around.others(worker))),
                [worker.identity.pidfd],
            )
        except OSError as error:
            self._problems.append(f"evidence: no process can be started ({error.strerror})")
            return
        self.gathering = True
        failpoint("incident.gathering")
        yield from self._around.clock.wait(within, lambda: helper.done)
        self.gathering = False
        failpoint("incident.gathered")
        if not helper.done:
            self._problems.append(f"evidence: not complete within {within:g} s")
            helper.kill()
        elif helper.result is None:
            self._problems.append("evidence: gathering it failed")
        else:
            self._debugger, self._evidence = _unpacked(helper.result)

    def _is_spared_as_debugged(self) -> bool:
        self._debugger = self._debugger or self._assumed_debugger()
        return self._debugger is not None and self._asks_for_debuggers()

    def _act(self) -> Generator[float, None, Outcome]:
        policy = self.verdict.policy
        found = self.verdict.found
        was_skipped = isinstance(found, Armed) and self.verdict.worker.reader.was_skipped(found)
        if was_skipped or policy.on_expiry is OnExpiry.REPORT:
            outcome = self._nothing_to_do()
            if outcome is None and was_skipped:
                self._note("look", _SKIPPED)
            return outcome or Outcome.REPORTED
        # Before anything is done, so that a report survives us.
        self._start_reporter()
        yield from self._inherit()
        failpoint("incident.reporter")
        if policy.on_expiry is OnExpiry.RAISE:
            outcome = yield from self._raise()
            if outcome is not None:
                return outcome
        error_file = yield from self._leave_error_file()
        outcome = None
        if policy.first_signal != signal.SIGKILL:
            outcome = yield from self._step(policy.first_signal, policy.signal_grace)
        if outcome is None:
            outcome = yield from self._step(signal.SIGKILL, _DEAD_WITHIN)
        if outcome is Outcome.REAPED:
            yield from self._end_tree()
            failpoint("ladder.ended")
        elif outcome is not None and error_file is not None:
            result = yield from error_file.take_back()
            if result:
                self._note("error file", result)
        return outcome or Outcome.UNKILLABLE

    def _inherit(self) -> Course:
        """Go on where a watcher that died has left off."""
        sentence = self.verdict.worker.sentence
        if sentence is not None:
            self._note(name_of(sentence.signal), BY_ANOTHER)
            self._tree.hold(sentence.doomed)
            while self._may_be_on_its_way_out() and monotonic() < sentence.until:
                yield min(sentence.until, monotonic() + 0.05)

    def _may_be_on_its_way_out(self) -> bool:
        worker = self.verdict.worker
        if worker.identity.is_dead():
            return False
        # It hangs up, or leaves the block on a signal, before it is dead.
        return worker.left or (self._signalled and not self._overdue())

    def _raise(self) -> Generator[float, None, Outcome | None]:
        """Have the worker raise `TimerExpired`; None if that has not ended the block."""
        verdict, worker = self.verdict, self.verdict.worker
        outcome = self._nothing_to_do()
        if outcome is not None:
            return outcome
        ending = SoftEnding(
            self._around.start_helper,
            self._around.clock,
            *(worker.identity, worker.reader, verdict.found, verdict.case.scope.thread),
            overdue=self._overdue,
            note=self._note,
        )
        self._announce(RAISE, [], verdict.policy.raise_grace)
        yield from ending.ask(verdict.policy.raise_grace)
        if self._was_raised():
            self._note("look", ENDED)
            return Outcome.RAISED
        return self._nothing_to_do()

    def _was_raised(self) -> bool:
        worker, found = self.verdict.worker, self.verdict.found
        if not isinstance(found, Armed) or not worker.reader.was_raised(found):
            return False
        # Of a process that has died since its page is still there.
        return self._around.look(worker, found) == ENDED

    def _leave_error_file(self) -> Generator[float, None, ErrorFile | None]:
        """Tell the worker's launcher why it dies, before it does."""
        verdict, worker = self.verdict, self.verdict.worker
        path = worker.hello.error_file
        if path is None or not self._overdue():
            return None
        if not worker.is_ours(verdict.case.scope.thread.native_id):
            return None
        error_file = ErrorFile(
            self._around.start_helper,
            self._around.clock,
            worker.identity,
            path,
            verdict.case,
            self._evidence,
            self._problems,
        )
        self._note("error file", (yield from error_file.write()))
        return error_file

    def _nothing_to_do(self) -> Outcome | None:
        """Look before a step: what makes it needless or unsafe, or None."""
        worker = self.verdict.worker
        if worker.identity.is_dead():
            ended = self._around.look(worker, self.verdict.found) == ENDED
            if ended and not self._signalled:  # before the process did
                self._note("look", ENDED)
                return Outcome.RECOVERED
            self._note("look", "it is dead")
            return Outcome.REAPED if self._signalled else Outcome.GONE
        ours = worker.is_ours(self.verdict.case.scope.thread.native_id)
        if ours is False or worker.left:
            self._note("look", "it is another program now, or has let go of its page")
            return Outcome.GONE
        change = self._around.look(worker, self.verdict.found)
        if change is not None:
            self._note("look", change)
            self._paused = change == PAUSED
            return Outcome.RECOVERED
        if ours is None:
            self._note("look", "the kernel won't say whether it is still the same program")
            return Outcome.REPORTED
        return None

    def _step(self, number: int, within: float) -> Generator[float, None, Outcome | None]:
        worker = self.verdict.worker
        doomed = []
        if self.verdict.policy.tree:
            doomed = self._tree.look(worker.identity, self._around.spared(worker))
            failpoint("ladder.tree")
        yield from self._wait_out_pause()
        outcome = self._nothing_to_do()
        if outcome is not None:
            return outcome
        failpoint("ladder.looked")
        self._announce(number, doomed, within)
        failpoint("ladder.announced")
        self._note(name_of(number), worker.identity.send(number))
        failpoint("ladder.sent")
        self._signalled = True
        # Who leaves the block on SIGTERM may be on its way out: it has the whole grace.
        if not (yield from self._around.clock.wait(within, worker.identity.is_dead, 0.05)):
            if number == signal.SIGKILL:
                self._note("confirm", f"it is not dead after {within:g} s")
            return None
        self._note("confirm", "it is dead")
        failpoint("ladder.confirmed")
        return Outcome.REAPED

    def _announce(self, number: int, doomed: list[Doomed], within: float) -> None:
        """Say what is about to be done to whoever goes on should we die at it."""
        worker, reporter = self.verdict.worker, self._reporter
        identity = None if reporter is None else reporter.identity
        until, block = monotonic() + within, self.verdict.found.block
        worker.sentence = Sentence(number, tuple(doomed), until, identity, block)
        self._around.keep_in_mind(worker)
        if reporter is not None:
            reporter.about_to_send(number, within)

    def _acquit(self) -> None:
        """Let nobody die with who has survived, should it end while its report is written."""
        worker = self.verdict.worker
        if worker.sentence is not None:
            worker.sentence = replace(worker.sentence, doomed=())
            self._around.keep_in_mind(worker)

    def _end_tree(self) -> Course:
        worker = self.verdict.worker
        around = self._around
        spared = around.spared(worker)
        yield from self._tree.end(worker.identity.uid, spared, around.clock, self._note)
        worker.sentence = None

    def _note(self, action: str, result: str) -> None:
        self._actions.append(Action(action, round(monotonic() - self.verdict.at, 6), result))

    def _start_reporter(self) -> None:
        verdict = self.verdict
        with contextlib.suppress(OSError):
            self._reporter = Reporter(
                self._around.start_helper,
                verdict.worker.identity,
                verdict.at,
                verdict.case,
                self._evidence,
                self._problems,
                self._around.settings.report_dir,
                self._was_raised,
            )

    def _tell(self, outcome: Outcome) -> Course:
        wait = self._around.clock.wait
        yield from wait(_PUBLISH_WITHIN, lambda: self._around.publishing() < MOST_PUBLISHING)
        if self._reporter is None:
            self._start_reporter()
        reporter = self._reporter
        if reporter is None:
            self._log_headline(outcome)
            return
        self.publishing = True
        reporter.finish(outcome, self._actions)
        failpoint("report.finished")
        yield from wait(_PUBLISH_WITHIN, reporter.send_rest, 0.005)
        yield from wait(_PUBLISH_WITHIN, lambda: reporter.helper.done)
        self.publishing = False
        failpoint("report.out")
        reporter.helper.kill()
        if reporter.helper.result is None:
            self._log_headline(outcome)
        self.told = True

    def _log_headline(self, outcome: Outcome) -> None:
        """Log what is known here, where no process could write the report."""
        report = self._report(outcome)
        text = f"{headline(report)}; its report could not be written"
        _log.warning("%s", text, extra={"hangwatch": facts(report, None)})
        self.told = True

    def _report(self, outcome: Outcome) -> Report:
        return Report(outcome, self.verdict.case, Evidence(), self._actions)

    def _insist(self) -> Course:
        back_off = _DEAD_WITHIN
        identity = self.verdict.worker.identity
        while not identity.is_dead():
            yield monotonic() + back_off
            identity.send(signal.SIGKILL)
            back_off = min(back_off * 2, _LONGEST_BACK_OFF)
        yield from self._end_tree()


def _packed(evidence: Evidence) -> bytes:
    # What the loop wants to know of it, and the rest as bytes that it only passes on.
    return pickle.dumps((evidence.debugger, pickle.dumps(evidence)))


def _unpacked(result: bytes) -> tuple[str | None, bytes]:
    debugger, evidence = pickle.loads(result)
    return debugger, evidence
