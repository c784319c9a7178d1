"""The helper that writes an incident's report, also if the watcher dies before it is told all."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from hangwatch.evidence.model import Action, Case, Evidence, Outcome, Report
from hangwatch.evidence.publish import publish
from hangwatch.process import Identity
from hangwatch.watcher.helper import Helper

# What is told before a signal is sent, and how long a death of it is waited for should
# the watcher die meanwhile. A worker that survives is its successor's to report.
_KILL, _ASK = b"k", b"t"
_DEAD_WITHIN = {_KILL: 5.0, _ASK: 0.0}
_PICKLED = b"\x80"  # how pickles begin


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

    Attributes:
        helper: the process.

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
    ) -> None:
        def work() -> bytes:
            ending = _ending(_read_all(inbox), identity, at)
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

    def about_to_send(self, number: int) -> None:
        """Tell it what would explain a death."""
        os.write(self._outbox, _KILL if number == signal.SIGKILL else _ASK)

    def finish(self, outcome: Outcome, actions: list[Action]) -> None:
        """Tell it how the incident ended; then call `send_rest` until that is true."""
        self._unsent = pickle.dumps((outcome, actions))

    def send_rest(self) -> bool:
        """Send what there is room for; tell whether that was the last of it."""
        try:
            self._unsent = self._unsent[os.write(self._outbox, self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, of what its own log tells
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


def _ending(told: bytes, identity: Identity, at: float) -> tuple[Outcome, list[Action]] | None:
    """Find how the incident ended from what the watcher told; None: nothing to report."""
    steps, _, rest = told.partition(_PICKLED)
    try:
        outcome, actions = pickle.loads(_PICKLED + rest)
    except Exception:
        # The watcher has died. What it was about to do it may have done.
        last = steps[-1:]
        if last and identity.is_dead(_DEAD_WITHIN[last]):
            now = round(monotonic() - at, 6)
            sent = "SIGKILL" if last == _KILL else "the first signal"
            died = "it is dead; the watcher has died meanwhile"
            return Outcome.REAPED, [Action(sent, now, "sent"), Action("confirm", now, died)]
        return None
    return outcome, actions
