"""The survivors of a kill storm: who starts them, and sees how they get on."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field

from stress.storm_board import SURVIVORS, Board, Order, Problems, fork
from stress.storm_workers import Timers, survive

PATIENCE = 5.0
"""How long a survivor may stand still, and a worker that hangs may live on: machines are busy."""
_FRESH = SURVIVORS
_LOOK_EVERY = 0.005


@dataclass
class Figures:
    """What came of the survivors.

    Attributes:
        late: how many seconds after their deadlines those who hung were dead.
        longest: the longest time in which a survivor did not get on, in seconds.
        unprotected: how many hung and were not killed in time.
        blocked: how many stood still, or did not end.
        killed: how many were killed, and overran nothing.
    """

    late: list[float] = field(default_factory=list)
    longest: float = 0.0
    unprotected: int = 0
    blocked: int = 0
    killed: int = 0


class Nursery:
    """The survivors, and whoever hangs.

    Args:
        timers: what they use.
        board: where they show how they get on.
        seed: of what they do.
        to: where to say what is wrong.
    """

    def __init__(self, timers: Timers, board: Board, seed: str, to: Problems) -> None:
        self.figures = Figures()
        self._timers = timers
        self._board = board
        self._dice = random.Random(seed)
        self._problems = to
        self._pids: dict[int, int] = {}
        self._told: dict[int, tuple[float, int]] = {}  # when, and after how many kills
        self._is_over = False

    def begin(self) -> None:
        """Start them, and see that whoever hangs is killed as long as nobody else is."""
        for place in range(SURVIVORS):
            self._start(place, Order.GO_ON)
        self._have_some_hang(0)
        self._wait_for_those_told()

    def run(self, kills: int, every: int) -> None:
        """Look after them until so many victims are dead, and have some hang every so often."""
        next_at, turn = every, 1
        while self._board.kills < kills and not self._board.stop:
            if self._board.kills >= next_at and not self._told:
                next_at = self._board.kills + every
                self._have_some_hang(turn % SURVIVORS)
                turn += 1
            self._look()
        self._wait_for_those_told()
        self._is_over = True
        for place in self._pids:
            self._tell(place, Order.HANG if place % 2 else Order.END)
        self._wait_for_those_told()

    def _have_some_hang(self, place: int) -> None:
        """Let a survivor hang, and a fresh worker."""
        self._start(_FRESH, Order.HANG)
        self._tell(place, Order.HANG)

    def _start(self, place: int, order: Order) -> None:
        me, seed = self._board.survivors[place], self._dice.random()
        me.clear(order)
        self._pids[place] = fork(lambda: survive(self._timers, me, seed))
        if order is not Order.GO_ON:
            self._tell(place, order)

    def _tell(self, place: int, order: Order) -> None:
        self._told[place] = time.monotonic(), self._board.kills
        self._board.survivors[place].order = order

    def _wait_for_those_told(self) -> None:
        while self._told:
            self._look()

    def _look(self) -> None:
        """See who is dead, who ought to be, and who stands still."""
        time.sleep(_LOOK_EVERY)
        for place in list(self._pids):
            dead, status = os.waitpid(self._pids[place], os.WNOHANG)
            if dead:
                self._judge_death(place, os.waitstatus_to_exitcode(status))
            else:
                self._judge_delay(place)

    def _judge_death(self, place: int, status: int) -> None:
        me = self._board.survivors[place]
        late = time.monotonic() - me.deadline
        if me.order == Order.HANG and me.deadline and late >= 0 and status == -signal.SIGKILL:
            self.figures.late.append(late)
        elif me.order != Order.END or status != 0:
            self.figures.killed += 1
            self._complain(place, f"ended with status {status}")
        self._forget(place)

    def _judge_delay(self, place: int) -> None:
        me, now = self._board.survivors[place], time.monotonic()
        told_at, _ = self._told.get(place, (me.beat, 0))
        if me.deadline:
            if now > me.deadline + PATIENCE:
                self.figures.unprotected += 1
                self._give_up(place, f"hangs, and lives {PATIENCE:g} s after its deadline")
        elif now > told_at + PATIENCE:
            self.figures.blocked += 1
            self._give_up(place, f"has been blocked for {PATIENCE:g} s")

    def _give_up(self, place: int, why: str) -> None:
        self._complain(place, why)
        os.kill(self._pids[place], signal.SIGKILL)
        os.waitpid(self._pids[place], 0)
        self._forget(place)

    def _complain(self, place: int, what: str) -> None:
        who = "a fresh worker" if place == _FRESH else f"survivor {place}"
        _, kills = self._told.get(place, (0.0, self._board.kills))
        task = {Order.GO_ON: "in its loop", Order.HANG: "to hang", Order.END: "to end"}
        order = task[Order(self._board.survivors[place].order)]
        self._problems.add(f"after {kills:,} kills {who} ({order}) {what}")

    def _forget(self, place: int) -> None:
        """Note what a dead worker has done; a survivor has a successor."""
        me = self._board.survivors[place]
        self.figures.longest = max(self.figures.longest, me.longest)
        del self._pids[place]
        self._told.pop(place, None)
        if place != _FRESH and not self._is_over:
            self._start(place, Order.GO_ON)
