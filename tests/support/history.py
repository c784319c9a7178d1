"""What happened in a test of many processes: the log of each, and what is read from the logs.

A process writes a record before it does something and another one after, each by one write
at once, so that a SIGKILL loses nothing that was done. All times are CLOCK_MONOTONIC. The soak,
the kill storm and the conformance scenarios all write such records.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from time import monotonic

STOPPED_FOR = 1.5
"""For at most so long the injector stops a worker."""
FULL_FOR = 2.0
"""For so long it fills the disk."""


@dataclass(slots=True)
class Record:
    """One line of a process's log.

    Attributes:
        at: when it was written.
        do: ``start`` and ``end`` of a program, and a ``problem`` that it found; ``executing``:
            another one takes its place now; ``forked``, and ``waited`` for; ``entering`` and
            ``entered``, ``leaving`` and ``left``, ``renewing`` and ``renewed``, ``cancelled`` of a
            block; ``raised`` in one; ``quick``: many blocks that came and went;
            ``passing``: from now on many do, and a kill may find any of them; ``stood still``:
            the machine did, for `value` seconds. A scenario has words of its own.
        block: number of the block in its process.
        scope: its name; of a ``problem``, what it is.
        limit: in seconds; of a renewal, the new one; of ``passing``, the shortest.
        on_expiry: what it asks for; None: the server's choice.
        grace: seconds that it asks for between the first step to end it and SIGKILL.
        patience: seconds that may pass by that, each of two steps having it.
        pauses: whether the block is a pause.
        watched: of ``entered`` and of ``quick``: whether the worker was connected by then.
        count: of ``quick``: how many blocks.
        pid, child: of ``start``, and whether another worker forked it; of ``forked``: a child
            that is a worker; of ``spawned``: one that is none.
        status, by_us: of ``waited``: how the child `pid` ended, and whether its parent killed it.
        value: a number that goes with the record.
    """

    at: float
    do: str
    block: int = 0
    scope: str = ""
    limit: float = 0.0
    on_expiry: str | None = None
    grace: float = 0.0
    patience: float = 0.0
    pauses: bool = False
    watched: bool = False
    count: int = 0
    pid: int = 0
    child: bool = False
    status: int = 0
    by_us: bool = False
    value: float = 0.0


class Log:
    """Where processes write records: a file, or a pipe.

    Args:
        descriptor: its writing end.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = descriptor

    def write(self, do: str, **fields: object) -> None:
        """Write a record."""
        line = json.dumps({"at": monotonic(), "do": do, **fields}) + "\n"
        os.write(self._file, line.encode())

    def close(self) -> None:
        """Close it, as a fork must that has a log of its own."""
        os.close(self._file)


def own_log(path: str | Path, child: bool = False) -> Log:
    """Begin the log of this process.

    Args:
        path: its file; of a folder, a new file in it.
        child: whether another worker forked this process.
    """
    if os.path.isdir(path):
        path = f"{path}/{os.getpid()}-{monotonic():.6f}.log"
    log = Log(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    log.write("start", pid=os.getpid(), child=child)
    return log


@dataclass(slots=True)
class Block:
    """A block as its process saw it.

    Attributes:
        earliest, latest: its deadline lies between them, as far as is known by now.
        entering, entered: it was entered between them; `entered` is infinite if it is unknown.
        ended: when it was left or cancelled, infinite if it was not.
        raised: when `TimerExpired` was raised in it.
        begun: when its renewal, or the leaving of it, began.
        watched: whether the worker was connected while it was inside.
        perhaps: when it may have been overdue: from, until.
        surely: when it was overdue without doubt.
    """

    scope: str
    limit: float
    on_expiry: str | None
    grace: float
    patience: float
    pauses: bool
    entering: float
    entered: float = inf
    ended: float = inf
    raised: float = inf
    begun: float = inf
    earliest: float = inf
    latest: float = inf
    watched: bool = False
    perhaps: list[tuple[float, float]] = field(default_factory=list)
    surely: list[tuple[float, float]] = field(default_factory=list)

    def may_be_overdue(self, since: float, until: float) -> bool:
        """Tell whether it may have been overdue at some moment from `since` until `until`."""
        return any(begin <= until and end >= since for begin, end in self.perhaps)

    def first_overdue(self) -> float:
        """Return when it may have been overdue first, infinite if never."""
        return min((begin for begin, _ in self.perhaps), default=inf)

    def no_longer_surely(self, when: float) -> None:
        """Note that whatever was its deadline may not hold from `when` on."""
        if self.latest < when:
            self.surely.append((self.latest, when))
        self.latest = inf

    def no_longer_perhaps(self, when: float) -> None:
        """Note that whatever was its deadline does not hold from `when` on."""
        if self.earliest <= when:
            self.perhaps.append((self.earliest, when))
        self.earliest = inf


@dataclass(frozen=True, slots=True)
class Death:
    """A process's end, as its parent or the driver saw it.

    Attributes:
        after: at the look before, it lived still.
        at: it was seen.
        status: how it ended, negative by a signal.
        by_us: whether the driver killed it.
        phase: what it was doing, as far as that is known.
    """

    after: float
    at: float
    pid: int
    status: int
    by_us: bool = False
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """What the driver inflicted, or what befell the watcher or the machine, and its cost.

    Attributes:
        at: when it began.
        costs: for so many seconds processes ran slowly or not at all: all of them, or `pid`.
    """

    at: float
    kind: str
    costs: float
    pid: int = 0


@dataclass(slots=True)
class Life:
    """One program in one process, from its start to its end, or to an exec.

    Attributes:
        pid: its process id.
        started: when its log begins.
        child: whether another worker forked it.
        ended: when it was known to be dead, or to have become another program.
        lived: until when at least it had not ended, as far as anybody looked.
        executing: when it was about to become another program.
        status: how it ended, negative by a signal; None: by an exec, or unknown.
        by_us: whether the driver killed it.
        last: when its last record was written.
        silent: the longest time between two records: from, until.
        quick: how many blocks came and went that are not in `blocks`.
        watched: whether it ever was connected.
        finished: whether it came to its own end.
        problems: what it complained of.
        faults: when it noticed that the machine stood still.
        waited: children that it saw ending.
        forked: children that are workers.
        spawned: children that are none.
    """

    pid: int
    started: float
    child: bool = False
    ended: float = inf
    lived: float = 0.0
    executing: float = inf
    status: int | None = None
    by_us: bool = False
    last: float = 0.0
    silent: tuple[float, float] = (0.0, 0.0)
    quick: int = 0
    watched: bool = False
    finished: bool = False
    problems: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    waited: list[Death] = field(default_factory=list)
    forked: list[int] = field(default_factory=list)
    spawned: list[int] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def pauses(self) -> list[Block]:
        """Return the pauses that are open."""
        return [block for block in self.blocks.values() if block.pauses and block.ended == inf]

    def close(self) -> None:
        """Come to a conclusion about what was open when the log ended."""
        for block in self.blocks.values():
            if block.ended == inf:
                self.suspend(block)
                block.no_longer_perhaps(inf)
                block.no_longer_surely(inf)

    def suspend(self, block: Block) -> None:
        """Note that its clock has stood still in the pauses that are open."""
        suspended = [pause for pause in self.pauses() if pause is not block and not block.pauses]
        if any(block.earliest > pause.entered for pause in suspended):
            block.earliest = inf
        if suspended:
            block.no_longer_surely(min(pause.entering for pause in suspended))


@dataclass(frozen=True, slots=True)
class Statement:
    """What the watcher said of an expiry, by an event or a report; `at` is when it was heard."""

    at: float
    pid: int
    scope: str
    outcome: str
    report: bool = False


@dataclass(slots=True)
class History:
    """All that there is to judge.

    Attributes:
        logged: of whose death for which scope the watcher's log tells.
        bystanders: processes that never overran anything: what they did, and their status.
    """

    lives: list[Life] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    logged: list[tuple[int, str]] = field(default_factory=list)
    bystanders: list[tuple[str, int]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def life_of(lines: list[str]) -> Life | None:
    """Read one log, None if nothing stands in it.

    A last line that a kill cut short does not count.
    """
    life = None
    for line in lines:
        if line.endswith("\n"):
            record = Record(**json.loads(line))
            if life is None:
                life = Life(record.pid, record.at, record.child, last=record.at)
            else:
                _take(life, record)
    if life is not None:
        life.close()
    return life


def _take(life: Life, record: Record) -> None:
    now = record.at
    life.silent = max(life.silent, (life.last, now), key=lambda silent: silent[1] - silent[0])
    life.last = now
    life.watched |= record.watched
    if record.do == "entering":
        life.blocks[record.block] = Block(
            record.scope,
            record.limit,
            record.on_expiry,
            record.grace,
            record.patience,
            record.pauses,
            entering=now,
            earliest=now + record.limit,
        )
    elif record.do == "quick":
        life.quick += record.count
    elif record.do == "passing":
        # Any of them may be overdue from then on, and none is for sure.
        passing = Block(record.scope, record.limit, None, 0.0, 0.0, False, entering=now)
        passing.perhaps.append((now + record.limit, inf))
        life.blocks[record.block] = passing
    elif record.do == "stood still":
        life.faults.append(Fault(now - record.value, "machine stood still", record.value))
    elif record.do == "end":
        life.finished = True
    elif record.do == "spawned":
        life.spawned.append(record.pid)
    elif record.do == "forked":
        life.forked.append(record.pid)
    elif record.do == "waited":
        # It may have been stopped meanwhile.
        after, how = now - STOPPED_FOR, (record.status, record.by_us, record.scope)
        life.waited.append(Death(after, now, record.pid, *how))
    elif record.do == "executing":
        life.executing = now
    elif record.do == "problem":
        life.problems.append(record.scope)
    block = life.blocks.get(record.block)
    if block is None:
        return
    if record.do == "entered":
        block.entered, block.latest, block.watched = now, now + block.limit, record.watched
    elif record.do == "renewing":
        block.no_longer_surely(now)
        block.begun = now
    elif record.do == "renewed":
        block.no_longer_perhaps(now)
        block.earliest, block.latest = block.begun + record.limit, now + record.limit
    elif record.do == "raised":
        block.raised = now
    elif record.do == "leaving":
        life.suspend(block)
        block.no_longer_surely(now)
        block.begun = now
    elif record.do in ("left", "cancelled"):
        life.suspend(block)
        block.no_longer_surely(now)
        block.no_longer_perhaps(now)
        block.ended = now
        if block.pauses and not life.pauses():
            _give_back(life, block)


def _give_back(life: Life, pause: Block) -> None:
    """Move the deadlines of what a pause suspended, now that it has ended."""
    for block in life.blocks.values():
        if block.ended < inf or block.pauses:
            continue
        if block.latest <= pause.entering:
            # Overdue before it, and so again after it.
            block.surely.append((block.latest, pause.entering))
            block.latest = pause.ended
        else:
            block.latest += pause.ended - max(pause.entering, block.entering)
        if block.earliest > pause.entered:
            block.earliest += max(0.0, pause.begun - max(pause.entered, block.entered))


def read_logs(folder: Path) -> list[Life]:
    """Read all logs of a folder."""
    lives = (life_of(path.read_text().splitlines(True)) for path in folder.glob("*.log"))
    return [life for life in lives if life is not None]


def bury(lives: list[Life], deaths: list[Death]) -> list[Death]:
    """Find each life's end: among the deaths that the driver saw, or a worker who forked it.

    Args:
        lives: all of them.
        deaths: what the driver saw.

    Returns:
        The deaths of processes that left no log.
    """
    without_a_log = []
    by_pid: defaultdict[int, list[Life]] = defaultdict(list)
    for life in sorted(lives, key=lambda life: life.started):
        by_pid[life.pid].append(life)
    seen = [*deaths, *(death for life in lives for death in life.waited)]
    # One that was logged may be seen again, if its parent was killed before it reaped it.
    for death in sorted(seen, key=lambda death: death.at):
        before = [
            life for life in by_pid[death.pid] if life.started <= death.at and life.ended == inf
        ]
        for life, following in pairwise(before):
            life.lived = life.ended = following.started
        if before:
            last = before[-1]
            last.lived, last.ended = max(death.after, last.started), death.at
            last.status, last.by_us = death.status, death.by_us
        elif not by_pid[death.pid]:
            without_a_log.append(death)
    for life in lives:
        life.close()
    return without_a_log
