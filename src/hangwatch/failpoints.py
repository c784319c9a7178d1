"""Named steps of the watcher at which a test can have it fail; inert otherwise.

``HANGWATCH_FAILPOINTS="ladder.sent=kill@1,visit.*=stop%0.001"`` says what happens where:
`kill` and `stop` say so on stderr and send the process that gets there SIGKILL or SIGSTOP,
`sleep:SECONDS` has it wait, `fail:ERRNO` raises an `OSError`. ``@N`` restricts that to the N-th
time that any process of this keeper gets there, ``%P`` to a share P of the times; else it is
each time. A name may end in ``*``.

Without that variable a failpoint is a call of an empty function, and none stands in what a
worker runs.
"""

from __future__ import annotations

import errno
import fnmatch
import mmap
import os
import random
import re
import signal
import time
from dataclasses import dataclass

VARIABLE = "HANGWATCH_FAILPOINTS"

NAMES = (
    # A newcomer: connected, said hello, offered to the keeper, kept, visited, told, noted.
    "handshake.accepted",
    "handshake.heard",
    "handshake.offered",
    "handshake.kept",
    "handshake.watched",
    "handshake.answered",
    "handshake.noted",
    # A visit: the worker rings whatever it does, the page was read, a promise stands.
    "visit.opened",
    "visit.read",
    "visit.promised",
    # An incident, from the verdict to the report.
    "incident.begun",
    "incident.settled",
    "incident.gathering",
    "incident.gathered",
    "incident.reporter",
    "raise.asked",
    "error-file.written",
    "ladder.tree",
    "ladder.looked",
    "ladder.announced",
    "ladder.sent",
    "ladder.confirmed",
    "ladder.ended",
    "report.finished",
    "report.out",
    # A watcher's beginning: forked, one worker taken over, visited, all of them.
    "handover.forked",
    "handover.taken",
    "handover.visited",
    "handover.ready",
    # It has ended what was to end with a worker that is dead.
    "sentence.carried-out",
    # In the helpers' own processes.
    "evidence.gathering",
    "evidence.asking",
    "evidence.publishing",
    # What the kernel may not have.
    "kernel.peer-pidfd",
    "kernel.acl",
    "kernel.pass-rights",
)

_RULE = re.compile(
    r"(?P<name>[a-z.*-]+)=(?P<action>kill|stop|sleep|fail)(:(?P<value>[A-Z0-9.]+))?"
    r"(@(?P<nth>\d+)|%(?P<share>[0-9.e-]+))?"
)


@dataclass(frozen=True, slots=True)
class _Rule:
    action: str
    value: str
    nth: int
    share: float
    counter: int


class _Failpoints:
    """What shall happen where, as a text says it.

    Raises:
        ValueError: the text says nothing of the kind.
    """

    def __init__(self, text: str) -> None:
        self._rules: dict[str, list[_Rule]] = {}
        rules = [rule.strip() for rule in text.split(",") if rule.strip()]
        # Shared with every fork: a successor of the watcher counts on.
        self._counters = memoryview(mmap.mmap(-1, 8 * max(1, len(rules)))).cast("Q")
        for counter, rule in enumerate(rules):
            self._add(rule, counter)

    def _add(self, text: str, counter: int) -> None:
        found = _RULE.fullmatch(text)
        if found is None:
            raise ValueError(f"{VARIABLE}: {text!r} is none of NAME=kill|stop|sleep:S|fail:ERRNO")
        action, value = found["action"], found["value"] or ""
        if action == "sleep":
            float(value)
        elif action == "fail" and not hasattr(errno, value):
            raise ValueError(f"{VARIABLE}: {value!r} is no name of an error: fail:ENOMEM")
        wanted = found["name"]
        names = fnmatch.filter(NAMES, wanted)
        if not names:
            raise ValueError(f"{VARIABLE}: there is no {wanted!r}: {', '.join(NAMES)}")
        share = float(found["share"] or 1.0)
        rule = _Rule(action, value, int(found["nth"] or 0), share, counter)
        for name in names:
            self._rules.setdefault(name, []).append(rule)

    def reach(self, name: str) -> None:
        """Do what shall happen here."""
        for rule in self._rules.get(name, ()):
            self._counters[rule.counter] += 1
            if rule.nth and self._counters[rule.counter] != rule.nth:
                continue
            # Not one that a fork shares with its siblings.
            if rule.share >= 1.0 or random.SystemRandom().random() < rule.share:
                _fail(name, rule)


def _fail(name: str, rule: _Rule) -> None:
    if rule.action == "sleep":
        time.sleep(float(rule.value))
    elif rule.action == "fail":
        number = getattr(errno, rule.value)
        raise OSError(number, os.strerror(number))
    else:
        os.write(2, f"hangwatch: failpoint {name}: {rule.action}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP)


if VARIABLE in os.environ:
    failpoint = _Failpoints(os.environ[VARIABLE]).reach
else:

    def failpoint(name: str) -> None:
        """Let a test have this step fail."""
