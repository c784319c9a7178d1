"""When and by whom a worker's error file is written: before the kill, by a helper."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator

from hangwatch.evidence import error_file
from hangwatch.evidence.model import Case, Evidence
from hangwatch.failpoints import failpoint
from hangwatch.process import Identity
from hangwatch.watcher.fair_clock import FairClock
from hangwatch.watcher.reporter import StartHelper

# A file system that answers no more delays the kill by so many seconds.
_WITHIN = 1.0
_LATE = f"failed: not done within {_WITHIN:g} s"

Course = Generator[float, None, str]


class ErrorFile:
    """The file in which a worker's launcher looks for the reason of its end.

    Args:
        start_helper: starts who writes it.
        clock: what waits for that.
        identity: the worker.
        path: where it is, by the worker's word.
        case: what the watcher knows.
        evidence: pickled `Evidence`, if any was gathered.
        problems: why some of it is missing.
    """

    def __init__(
        self,
        start_helper: StartHelper,
        clock: FairClock,
        identity: Identity,
        path: str,
        case: Case,
        evidence: bytes | None,
        problems: list[str],
    ) -> None:
        self._start_helper = start_helper
        self._clock = clock
        self._identity = identity
        self._path = path
        self._case = case
        self._evidence = evidence
        self._problems = problems
        self._written = ""

    def write(self) -> Course:
        """Write it; return what came of it."""
        self._written = yield from self._do(error_file.write)
        failpoint("error-file.written")
        return self._written

    def take_back(self) -> Course:
        """Remove what was written; return what came of it, nothing if there is nothing to do."""
        if self._written not in (error_file.CREATED, error_file.FILLED, _LATE):
            return ""
        created = self._written != error_file.FILLED
        return (
            yield from self._do(lambda path, content: error_file.take_back(path, content, created))
        )

    def _do(self, act: Callable[[str, bytes], str]) -> Course:
        def work() -> bytes:
            try:
                # The bytes are our own helper's, passed on through our own memory.
                evidence = self._evidence
                found = Evidence() if evidence is None else pickle.loads(evidence)
                found.missing.extend(self._problems)
                content = error_file.content_of(self._case, found)
                error_file.take_rights_of(self._identity)
                return act(self._path, content).encode()
            except OSError as error:
                return f"failed: {error.strerror}".encode()

        try:
            helper = self._start_helper(work, [self._identity.pidfd])
        except OSError as error:
            return f"failed: no process can be started ({error.strerror})"
        if not (yield from self._clock.wait(_WITHIN, lambda: helper.done)):
            helper.kill()
            return _LATE
        return "failed: see the log" if helper.result is None else helper.result.decode()
