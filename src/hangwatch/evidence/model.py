"""The values that a report is made of. docs/report.md describes them as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

SCHEMA = "hangwatch.report/1"
GAP = "<gap>"
"""The name of what a worker overruns that stays outside of every block."""


class Outcome(StrEnum):
    """How an incident ended."""

    REAPED = "reaped"
    """Killed by us, its death confirmed."""
    RECOVERED = "recovered"
    """The block ended by itself before any harm was done."""
    RAISED = "raised"
    """`TimerExpired` was raised in the block, and ended it."""
    REPORTED = "reported"
    """Left alone, as `on_expiry` says or because killing was not safe."""
    GONE = "gone"
    """It died otherwise, before we killed it."""
    UNKILLABLE = "unkillable"
    """It did not die of SIGKILL in time; tried again until it does."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One Python frame."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """One thread's Python frames, innermost first.

    Attributes:
        id: `threading.get_ident()`.
        name: its name, where it is known.
        holds_scope: whether it is inside the block that overran.
        frames: empty where no Python runs in it.
        cut: whether there were more frames than the dump shows.
    """

    id: int
    name: str | None
    holds_scope: bool
    frames: list[Frame]
    cut: bool


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel thread, as /proc shows it; None is what the kernel would not say."""

    tid: int
    comm: str
    state: str
    wchan: str | None
    syscall: str | None
    cpu_s: float
    cpu_gained_s: float


@dataclass(frozen=True, slots=True)
class Child:
    """One descendant process."""

    pid: int
    ppid: int
    name: str
    state: str
    command: list[str]


@dataclass(frozen=True, slots=True)
class Process:
    """The hung process as the kernel sees it.

    Attributes:
        state: letter of proc(5): R running, S sleeping, D uninterruptible, T stopped ...
        wchan: kernel function it sleeps in, where the kernel tells.
        cpu_s: CPU time used so far, in seconds.
        cpu_gained_s: CPU time used between two readings, `between_s` apart.
        rss_bytes: resident memory.
    """

    state: str | None = None
    wchan: str | None = None
    cpu_s: float | None = None
    cpu_gained_s: float | None = None
    between_s: float | None = None
    rss_bytes: int | None = None
    children: list[Child] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OpenScope:
    """A block that another worker was inside of at the verdict; seconds.

    Attributes:
        limit_s: how long it may take; of a renewed block, its present interval.
        inside_s: how long it has been in there, suspended time not counted.
        entry: how often its thread had entered it.
        pauses: whether the block suspends the worker's others.
    """

    name: str
    limit_s: float
    inside_s: float
    entry: int
    pauses: bool = False


@dataclass(frozen=True, slots=True)
class OtherWorker:
    """What another worker was doing at the verdict."""

    pid: int
    labels: dict[str, str]
    scopes: list[OpenScope]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was gathered; `missing` says what was not, and why.

    `debugger` says which debugger holds the process, if any.
    """

    threads: list[ThreadStack] = field(default_factory=list)
    process: Process = field(default_factory=Process)
    others: list[OtherWorker] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    debugger: str | None = None


@dataclass(frozen=True, slots=True)
class ScopeThread:
    """The thread that is inside of the block."""

    id: int
    native_id: int
    name: str


@dataclass(frozen=True, slots=True)
class Scope:
    """The block that overran.

    Attributes:
        limit_s: how long it may take; of a renewed block, its present interval.
        inside_s: how long the thread had been inside at the verdict, suspended time not
            counted.
        late_s: from the deadline to the verdict.
        entry: how often this thread had entered it, this time included.
        enclosing: names of the open blocks around it, innermost first.
        within: names of the open blocks inside of it, innermost first.
        since_renewal_s: how long ago it was renewed; None: never.
        pauses: whether it suspends the worker's other timers.
    """

    name: str
    limit_s: float
    inside_s: float
    late_s: float
    entry: int
    thread: ScopeThread
    enclosing: list[str]
    within: list[str] = field(default_factory=list)
    since_renewal_s: float | None = None
    pauses: bool = False


@dataclass(frozen=True, slots=True)
class Worker:
    """The process that overran; `start_time` in seconds since the epoch."""

    pid: int
    uid: int
    start_time: float | None
    labels: dict[str, str]
    command: list[str]
    python: str


@dataclass(frozen=True, slots=True)
class Action:
    """One step of the ladder, `at_s` seconds after the verdict."""

    action: str
    at_s: float
    result: str


@dataclass(frozen=True, slots=True)
class Case:
    """What the watcher knew at the verdict; `at` in seconds since the epoch."""

    at: float
    worker: Worker
    scope: Scope


@dataclass(frozen=True, slots=True)
class Report:
    """All of one incident."""

    outcome: Outcome
    case: Case
    evidence: Evidence
    actions: list[Action]
