"""Asking a worker's main thread to raise `TimerExpired`; its handler is `worker.soft_ending`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

from hangwatch import linux
from hangwatch.evidence.model import ScopeThread
from hangwatch.evidence.stacks import who_takes
from hangwatch.failpoints import failpoint
from hangwatch.page.view import Armed
from hangwatch.process import Identity
from hangwatch.watcher.fair_clock import FairClock
from hangwatch.watcher.page_reader import Overdue, PageReader
from hangwatch.watcher.reporter import StartHelper

_ANSWER_WITHIN = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0

Course = Generator[float, None, None]


class SoftEnding:
    """The attempt to end a block from inside.

    Args:
        start_helper: starts who sends the signal.
        clock: what waits.
        identity: the worker.
        reader: its page.
        found: what is overdue.
        thread: whose block it is.
        overdue: a fresh look whether the block has not ended.
        note: told what was done, and what came of it.
    """

    def __init__(
        self,
        start_helper: StartHelper,
        clock: FairClock,
        identity: Identity,
        reader: PageReader,
        found: Overdue,
        thread: ScopeThread,
        overdue: Callable[[], bool],
        note: Callable[[str, str], None],
    ) -> None:
        self._start_helper = start_helper
        self._clock = clock
        self._identity = identity
        self._reader = reader
        self._found = found
        self._thread = thread
        self._overdue = overdue
        self._note = note
        self._noted = ""

    def ask(self, within: float) -> Course:
        """Ask, if need be again and again, and wait `within` seconds for the block's end."""
        problem = self._why_not()
        if problem is not None:
            # It has the same time, only nobody to tell it.
            self._say(problem)
            yield from self._clock.wait(within, lambda: not self._overdue(), 0.02)
            return
        pause = _FIRST_PAUSE
        yield from self._send()
        while within > 0.0 and self._overdue():
            share = min(pause, within)
            within -= share
            pause = min(2 * pause, _LONGEST_PAUSE)
            ended = yield from self._clock.wait(share, lambda: not self._overdue(), 0.02)
            # It may have been at a place where nothing can be raised, or have masked the signal.
            if within > 0.0 and not ended and not self.was_raised():
                yield from self._send()

    def was_raised(self) -> bool:
        """Tell whether it was raised in the block, which may have ended since."""
        return isinstance(self._found, Armed) and self._reader.was_raised(self._found)

    def _why_not(self) -> str | None:
        if not isinstance(self._found, Armed):
            return "not possible: it is in no block"
        if self._thread.native_id != self._identity.pid:
            return "not possible: Python raises in the main thread alone"
        if self._reader.task(self._found) != 0.0:
            return "not possible: it would hit whichever task of the event loop runs at that moment"
        if self._reader.raise_signal() == 0:
            return "not possible: the worker has no signal for it"
        return None

    def _send(self) -> Course:
        reader, found = self._reader, self._found
        number = reader.raise_signal()

        def work() -> bytes:
            return _send(self._identity, number, partial(reader.is_still, found)).encode()

        try:
            helper = self._start_helper(work, [self._identity.pidfd])
        except OSError as error:
            self._say(f"failed: no process can be started ({error.strerror})")
            return
        yield from self._clock.wait(_ANSWER_WITHIN, lambda: helper.done)
        helper.kill()
        failpoint("raise.asked")
        self._say("failed: no answer" if helper.result is None else helper.result.decode())

    def _say(self, result: str) -> None:
        if result != self._noted:
            self._noted = result
            self._note("raise", result)


def _send(identity: Identity, number: int, is_overdue: Callable[[], bool]) -> str:
    """Send a worker's main thread the signal at which it raises; say what came of it.

    It reads /proc, which may block: see `helper`.
    """
    if number == 0:
        return "failed: the worker has no signal for it any more"
    # A signal that nobody catches kills.
    tid, problem = who_takes(identity.pid, number, [identity.pid])
    if tid is None:
        return f"failed: {problem}"
    if identity.is_dead():
        return "failed: it is dead"
    if not identity.is_theirs():
        return "failed: it is another user's by now"
    if not is_overdue():
        return "not asked: the block has ended"
    try:
        linux.signal_thread(identity.pid, tid, number)
    except OSError as error:
        return f"failed: {error.strerror}"
    return "asked"
