"""The helper that writes an incident's report, also if the watcher dies before it is told all."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable
from time import monotonic, sleep
from typing import Protocol

from hangwatch.evidence.model import Action, Case, Evidence, Outcome, Report
from hangwatch.evidence.publish import publish
from hangwatch.process import Identity, read_stat
from hangwatch.watcher.descendants import Doomed
from hangwatch.watcher.helper import Helper

RAISE = 0
"""In the place of a signal's number: the worker is asked to raise."""
BY_ANOTHER = "done, or about to be, by a watcher that has died"

_PICKLED = b"\x80"  # how pickles begin
_LOOK_EVERY = 0.02


class StartHelper(Protocol):
    """Starts a helper of the watcher: `Watcher.start_helper`."""

    def __call__(
        self, work: Callable[[], bytes], keep: list[int], outlives: bool = False
    ) -> Helper:
        """Start it."""


class Reporter:
    """A process that holds all that is known of an incident and waits for the rest.

    Args:
        start_helper: how it is started.
        identity: the worker.
        at: when the verdict was (CLOCK_MONOTONIC).
        case: what the watcher knew then.
        evidence: pickled `Evidence`, if any was gathered.
        problems: why some of it is missing.
        directory: the report folder, see `publish`.
        was_raised: a look whether `TimerExpired` has ended the block.

    Attributes:
        helper: the process.
        identity: who that is; None if /proc doesn't say.

    Raises:
        OSError: no process or no descriptor is left.
    """

    def __init__(
        self,
        start_helper: StartHelper,
        identity: Identity,
        at: float,
        case: Case,
        evidence: bytes | None,
        problems: list[str],
        directory: str | None,
        was_raised: Callable[[], bool],
    ) -> None:
        def work() -> bytes:
            ending = _ending(_read_all(inbox), identity, at, was_raised)
            if ending is not None:
                # The bytes are our own helper's, passed on through our own memory.
                found = Evidence() if evidence is None else pickle.loads(evidence)
                found.missing.extend(problems)
                publish(Report(ending[0], case, found, ending[1]), directory)
            return b""

        inbox, self._outbox = os.pipe()
        self._unsent = b""
        os.set_blocking(self._outbox, False)
        try:
            self.helper = start_helper(work, [inbox, identity.pidfd], outlives=True)
        except OSError:
            os.close(self._outbox)
            raise
        finally:
            os.close(inbox)
        stat = read_stat(self.helper.pid)
        self.identity: Doomed | None = None if stat is None else (stat.pid, stat.start_ticks)

    def about_to_send(self, number: int, within: float) -> None:
        """Tell it what would explain a death, or with `RAISE` a block's end, within some seconds.

        For so long it waits for that, should the watcher die meanwhile; a successor that finds
        the worker alive and overdue ends it, see `Sentence`.
        """
        with contextlib.suppress(OSError):  # it has ended, see `send_rest`
            os.write(self._outbox, b"%d %f\n" % (number, within))

    def finish(self, outcome: Outcome, actions: list[Action]) -> None:
        """Tell it how the incident ended; then call `send_rest` until that is true."""
        self._unsent = pickle.dumps((outcome, actions))

    def send_rest(self) -> bool:
        """Send what there is room for; tell whether that was the last of it."""
        try:
            self._unsent = self._unsent[os.write(self._outbox, self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has ended; whoever waits for its result learns that
            self._unsent = b""
        if self._unsent:
            return False
        self.hang_up()
        return True

    def hang_up(self) -> None:
        """Tell it nothing more; twice does no harm."""
        if self._outbox >= 0:
            os.close(self._outbox)
            self._outbox = -1


def _read_all(descriptor: int) -> bytes:
    return b"".join(iter(lambda: os.read(descriptor, 1 << 16), b""))


def _ending(
    told: bytes, identity: Identity, at: float, was_raised: Callable[[], bool]
) -> tuple[Outcome, list[Action]] | None:
    """Find how the incident ended from what the watcher told; None: nothing to report."""
    steps, _, rest = told.partition(_PICKLED)
    try:
        outcome, actions = pickle.loads(_PICKLED + rest)
    except Exception:
        # The watcher has died. What it was about to do it may have done.
        if not steps:
            return None
        word, within = steps.splitlines()[-1].split()
        number = int(word)
        if number == RAISE:
            outcome, came = Outcome.RAISED, _comes_true(was_raised, float(within))
            proof = Action("look", round(monotonic() - at, 6), "the block has ended by it")
        else:
            outcome, came = Outcome.REAPED, identity.is_dead(float(within))
            proof = Action("confirm", round(monotonic() - at, 6), "it is dead")
        actions = [Action(name_of(number), proof.at_s, BY_ANOTHER), proof]
        return (outcome, actions) if came else None
    return outcome, actions


def _comes_true(fact: Callable[[], bool], within: float) -> bool:
    until = monotonic() + within
    while not fact():
        if monotonic() >= until:
            return False
        sleep(_LOOK_EVERY)
    return True


def name_of(number: int) -> str:
    """Return a signal's name; of `RAISE`, what is done instead."""
    if number == RAISE:
        return "raise"
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals in between
        return f"signal {number}"
