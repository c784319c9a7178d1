"""The driver of a kill storm: it starts everybody, kills the victims, and logs each death."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import time
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from stress.workers import (
    END,
    HANG,
    HANGS_AFTER,
    KINDS,
    WEIGHTS,
    Phase,
    Timers,
    be_a_victim,
    survive,
)
from support.clocks import STOOD_STILL, Clocks
from support.history import own_log
from support.processes import fork

NATIVE = "native"
"""The way that our clients find by themselves, through the watcher beside the server."""
LEGACY = "legacy"
"""The way through the queue, which is PyTorch's only one."""

_VICTIMS, _SURVIVORS = 8, 4
# Seconds from the phase at which a victim's time begins to the kill. Of those that overrun, some
# are killed by the server before.
_LIVES = (0.006, 0.05)
# The phase at which a victim's time begins, and how many of twenty begin at it: some die while
# they start, some while they connect, most while they arm.
_BEGINS = {Phase.STARTS: 1, Phase.CONNECTS: 6, Phase.ENTERS: 13}
_OVERRUNS = (0.05, 0.6)
# The driver must not wait for the CPU until victims that use it up let go of it.
_NICE = 5
_LOOK_EVERY = 0.005
# For so long somebody who was killed takes to die.
_DYING = 0.0005
# Beyond its patience, so that the checker sees that it was exceeded.
_GIVES_UP_AFTER = HANGS_AFTER + 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """One storm.

    Attributes:
        road: `NATIVE` or `LEGACY`.
        kills: how many victims are killed.
        seed: of the dice.
        patience: for how many seconds a survivor may stand still, and a hang live on.
        folder: for its logs, and all that it leaves.
    """

    road: str
    kills: int
    seed: int
    patience: float
    folder: Path

    @property
    def log(self) -> Path:
        """The driver's log."""
        return self.folder / "driver.log"


@dataclass(slots=True)
class _Victim:
    pid: int
    place: int
    kind: str
    begins: Phase
    lives: float
    dies_at: float = inf
    killed: bool = False


@dataclass(slots=True)
class _Survivor:
    pid: int
    log: Path
    orders: int
    told: bytes = b""
    size: int = 0
    seen_at: float = field(default_factory=time.monotonic)


class Driver:
    """Has one storm, which ends as soon as something is wrong.

    Args:
        timers: what the workers use.
        plan: what it is to be.
    """

    def __init__(self, timers: Timers, plan: Plan) -> None:
        self._timers = timers
        self._plan = plan
        self._log = own_log(plan.log)
        self._clocks = Clocks(plan.folder)
        self._dice = random.Random(f"{plan.seed} {plan.road}")
        self._phases = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._victims: list[_Victim] = []
        self._survivors: list[_Survivor] = []
        self._started = 0
        self._kills = 0
        self._look_at = 0.0
        self._awake_by = inf
        self._stop = False
        self._is_over = False

    def run(self) -> None:
        """Have the storm."""
        self._timers.import_what_workers_do()
        for _ in range(_SURVIVORS):
            self._start_survivor()
        # If nobody ends a hang before the storm, the storm shows nothing.
        self._have_some_hang()
        while self._is_waiting():
            self._look()
        every = next_at = max(10, self._plan.kills // 100)
        while self._kills < self._plan.kills and not self._stop:
            self._start_victims()
            self._look()
            if self._kills >= next_at and not self._is_waiting():
                next_at = self._kills + every
                self._have_some_hang()
        self._is_over = True
        for victim in self._victims:
            victim.dies_at = 0.0
        while self._victims or self._is_waiting():
            self._look()
        for number, survivor in enumerate(self._survivors):
            self._tell(survivor, HANG if number % 2 else END)
        while self._is_waiting():
            self._look()
        self._clocks.close()
        self._log.write("end")

    # -- victims

    def _start_victims(self) -> None:
        for place in set(range(_VICTIMS)) - {victim.place for victim in self._victims}:
            self._phases[place] = Phase.STARTS
            (kind,) = self._dice.choices(KINDS, WEIGHTS)
            longest = self._dice.choice(_OVERRUNS if kind == "overruns" else _LIVES)
            lives, seed = self._dice.uniform(0, longest), self._dice.random()

            def victim(place: int = place, kind: str = kind, seed: float = seed) -> None:
                os.nice(_NICE)
                be_a_victim(self._timers, self._phases, place, kind, seed)

            (begins,) = self._dice.choices(list(_BEGINS), list(_BEGINS.values()))
            if kind == "overruns":  # it may hang in its very first block
                begins = min(begins, Phase.CONNECTS)
            self._victims.append(_Victim(fork(victim), place, kind, begins, lives))

    def _look_at_victim(self, victim: _Victim) -> None:
        """Kill a victim whose time it is; note its death, whoever has killed it.

        It is our child, and so can't be anybody else by now. Nobody waits for its end, which may
        take until it gets the CPU: meanwhile others would live for too long.
        """
        dead, status = os.waitpid(victim.pid, os.WNOHANG)
        if not dead and not victim.killed:
            os.kill(victim.pid, signal.SIGKILL)
            victim.killed = True
        elif dead:
            self._victims.remove(victim)
            self._kills += victim.killed
            self._stop |= not victim.killed and victim.kind != "overruns"
            phase = "" if self._is_over else Phase(self._phases[victim.place]).name
            self._note_death(victim.pid, status, phase, victim.killed)

    def _note_death(self, pid: int, status: int, phase: str = "", by_us: bool = False) -> None:
        code = os.waitstatus_to_exitcode(status)
        self._log.write("waited", pid=pid, status=code, scope=phase, by_us=by_us)

    # -- survivors

    def _start_survivor(self) -> _Survivor:
        self._started += 1
        path = self._timers.logs / f"survivor-{self._started}.log"
        seed, (reading, writing) = self._dice.random(), os.pipe()
        pid = fork(lambda: survive(self._timers, path, reading, seed))
        os.close(reading)
        survivor = _Survivor(pid, path, writing)
        self._survivors.append(survivor)
        return survivor

    def _have_some_hang(self) -> None:
        """Let the oldest survivor hang, and a worker that has just been started."""
        self._tell(self._survivors[0], HANG)
        self._tell(self._start_survivor(), HANG)

    def _tell(self, survivor: _Survivor, order: bytes) -> None:
        survivor.told, survivor.seen_at = order, self._ran()
        with contextlib.suppress(BrokenPipeError):  # that it is dead is seen at the next look
            os.write(survivor.orders, order)

    def _is_waiting(self) -> bool:
        """Tell whether any survivor that was told to hang, or to end, lives still."""
        return any(survivor.told for survivor in self._survivors)

    # -- everybody

    def _look(self) -> None:
        """Sleep a moment; kill the victims whose time it is; see who of the survivors is dead."""
        now = time.monotonic()
        if now > self._awake_by + STOOD_STILL:
            # Whom it should have killed lived on meanwhile, and who died was not seen to.
            self._log.write("stood still", value=now - self._awake_by)
        for victim in self._victims:
            if victim.dies_at == inf and self._phases[victim.place] >= victim.begins:
                victim.dies_at = now + victim.lives
        due = min((each.dies_at for each in self._victims if not each.killed), default=now + 1)
        dying = any(each.killed for each in self._victims)
        self._awake_by = max(now, min(due, self._look_at, now + (_DYING if dying else 1)))
        time.sleep(self._awake_by - now)
        for victim in list(self._victims):
            if victim.killed or victim.dies_at <= time.monotonic():
                self._look_at_victim(victim)
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_EVERY
        for survivor in list(self._survivors):
            dead, status = os.waitpid(survivor.pid, os.WNOHANG)
            gives_up = not dead and self._is_silent(survivor)
            if gives_up:
                os.kill(survivor.pid, signal.SIGKILL)
                _, status = os.waitpid(survivor.pid, 0)
            if dead or gives_up:
                self._stop |= gives_up or not survivor.told
                self._note_death(survivor.pid, status, by_us=gives_up)
                os.close(survivor.orders)
                self._survivors.remove(survivor)
                if len(self._survivors) < _SURVIVORS and not self._is_over:
                    self._start_survivor()

    def _is_silent(self, survivor: _Survivor) -> bool:
        """Tell whether its log has not grown for too long: it hangs, or stands still."""
        size = survivor.log.stat().st_size if survivor.log.exists() else 0
        if size != survivor.size:
            survivor.size, survivor.seen_at = size, self._ran()
        return self._ran() - survivor.seen_at > self._plan.patience + _GIVES_UP_AFTER

    def _ran(self) -> float:
        """Return the time, without that in which the machine stood still."""
        return time.monotonic() - self._clocks.stood_still()
