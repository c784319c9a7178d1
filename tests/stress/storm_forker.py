"""Who forks the victims of a kill storm, and kills each at a time that the dice choose."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass

from stress.storm_board import AT_ONCE, Board, Forker, Phase, Problems, fork
from stress.storm_workers import KINDS, WEIGHTS, Timers, be_a_victim

# Seconds from the fork to the kill: some die while they connect, most while they arm. Of those
# that overrun, some are killed by the server before.
_LIVES = (0.006, 0.05)
_OVERRUNS = (0.05, 0.6)
# Who kills must not wait for the CPU until victims that use it up let go of it.
_NICE = 5


@dataclass(slots=True)
class _Victim:
    pid: int
    place: int
    kind: str
    dies_at: float


def storm(timers: Timers, board: Board, number: int, kills: int, seed: str, to: Problems) -> None:
    """Kill so many victims, or until something is wrong."""
    me = board.forkers[number]
    dice = random.Random(seed)
    timers.import_what_workers_do()
    victims: list[_Victim] = []
    while me.kills < kills and not board.stop:
        free = set(range(AT_ONCE)) - {one.place for one in victims}
        victims += [_start(timers, me, place, dice) for place in sorted(free)]
        victim = min(victims, key=lambda one: one.dies_at)
        time.sleep(max(0.0, victim.dies_at - time.monotonic()))
        victims.remove(victim)
        _kill(victim, me, to)
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
        os.waitpid(victim.pid, 0)


def _start(timers: Timers, me: Forker, place: int, dice: random.Random) -> _Victim:
    me.phases[place] = Phase.STARTS
    (kind,) = dice.choices(KINDS, WEIGHTS)
    seed, longest = dice.random(), dice.choice(_OVERRUNS if kind == "overruns" else _LIVES)
    lives = dice.uniform(0, longest)

    def victim() -> None:
        os.nice(_NICE)
        be_a_victim(timers, me, place, kind, seed)

    pid = fork(victim)
    return _Victim(pid, place, kind, time.monotonic() + lives)


def _kill(victim: _Victim, me: Forker, to: Problems) -> None:
    """Kill a victim that is our child, and so can't be anybody else by now."""
    dead, status = os.waitpid(victim.pid, os.WNOHANG)
    if not dead:
        os.kill(victim.pid, signal.SIGKILL)
        os.waitpid(victim.pid, 0)
        me.kills += 1
        me.died[me.phases[victim.place]] += 1
    elif victim.kind == "overruns" and os.WIFSIGNALED(status):
        me.ended += 1
    else:
        status = os.waitstatus_to_exitcode(status)
        to.add(f"a victim ({victim.kind}) ended by itself, or was killed: status {status}")
