"""What a worker's page must say of its open blocks: the whole of it, in the fewest words.

A time is known to lie between two others, those at which the worker began what it was told to
do and was done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hangwatch.page import layout
from support.one_worker import TASKS, THREADS

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Between:
    """A time, or a number of seconds, of which this much is known."""

    low: float
    high: float

    def __add__(self, other: Between) -> Between:
        return Between(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Between) -> Between:
        return Between(self.low - other.high, self.high - other.low)

    def __contains__(self, number: float) -> bool:
        return self.low - _ROUNDING <= number <= self.high + _ROUNDING


def exactly(number: float) -> Between:
    return Between(number, number)


def later(one: Between, other: Between) -> Between:
    return Between(max(one.low, other.low), max(one.high, other.high))


def _moved(when: Between, since: Between, until: Between) -> Between:
    # Steps follow each other: what was within the pause was so for certain.
    return until if when.low > since.high else when + (until - since)


@dataclass
class Timer:
    """What `expires` returned, under its name here."""

    name: str
    scope: str
    limit: float
    pauses: bool


@dataclass
class Block:
    """A block, until its statement ends. Its times are moved by pauses as if it had begun later.

    Attributes:
        is_open: False once `__exit__` was called by hand.
        is_skipped: whether one that its thread entered earlier was left before it.
    """

    timer: Timer
    entered: Between
    began: Between
    interval: float
    is_renewed: bool = False
    is_cancelled: bool = False
    is_open: bool = True
    is_skipped: bool = False
    slot: tuple[int, float] = (-1, 0.0)

    @property
    def deadline(self) -> Between:
        if self.is_cancelled:
            return exactly(layout.NEVER)
        return self.began + exactly(self.interval)

    def renew(self, interval: float | None, at: Between) -> None:
        self.interval = self.timer.limit if interval is None else interval
        self.began, self.is_renewed, self.is_cancelled = at, True, False
        self.is_skipped = False

    def cancel(self) -> None:
        self.is_skipped = False
        self.interval, self.is_renewed, self.is_cancelled = self.timer.limit, True, True

    def go_on(self, since: Between, until: Between) -> None:
        """End a pause: what went by of it is as if it had not been, but for what was overdue."""
        if self.deadline.low > since.high:
            self.entered = _moved(self.entered, since, until)
            self.began = _moved(self.began, since, until)


@dataclass
class Model:
    """What must be so: the blocks of each thread and task, outermost first."""

    blocks: dict[str, list[Block]] = field(
        default_factory=lambda: {who: [] for who in (*THREADS, *TASKS)}
    )
    paused_since: Between | None = None

    def open(self) -> list[Block]:
        return [block for who in self.blocks for block in self.open_of(who)]

    def open_of(self, who: str) -> list[Block]:
        return [block for block in self.blocks[who] if block.is_open]

    def enter(self, who: str, timer: Timer, at: Between) -> Block:
        if timer.pauses and self.paused_since is None:
            self.paused_since = at
        block = Block(timer, at, at, timer.limit)
        self.blocks[who].append(block)
        return block

    def leave(self, who: str, levels: int, at: Between) -> None:
        for _ in range(min(levels, len(self.blocks[who]))):
            self._end(self.blocks[who].pop(), at)

    def leave_one(self, who: str, timer: Timer, at: Between, *, in_loop: bool) -> None:
        """Leave a block by hand, whichever it is; in a thread, what is inside of it is skipped."""
        block = self.block_of(timer)
        if block is None:
            return
        if who in THREADS and not in_loop and block in self.blocks[who]:
            for inner in self.blocks[who][self.blocks[who].index(block) + 1 :]:
                inner.is_skipped = True
        self._end(block, at)

    def _end(self, block: Block, at: Between) -> None:
        block.is_open = False
        since = self.paused_since
        if since is not None and not any(other.timer.pauses for other in self.open()):
            self.paused_since = None
            for other in self.open():
                other.go_on(since, at)

    def block_of(self, timer: Timer) -> Block | None:
        """Return a timer's block, if it is open."""
        return next((block for block in self.open() if block.timer is timer), None)
